//! How fast a request may fill.

use crate::sync::time::{Duration, Instant};

/// The speed limit of one request.
pub struct Rate {
    pub started: Instant,
    /// Bytes per second; 0: no limit.
    pub rate: u64,
    pub bytes: u64,
}

impl Rate {
    pub fn due(&self) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(self.bytes as f64 / self.rate as f64).saturating_sub(self.started.elapsed())
    }
}
