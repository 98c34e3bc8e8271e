//! Time: std's, or a simulated clock.

#[cfg(not(shuttle))]
pub use std::time::{Duration, Instant};

#[cfg(shuttle)]
pub use super::simulated::time::{Duration, Instant};
