//! The path of a fault after `service::queues` has read it, in reading order: `demand` → `fill` → `install`.

pub mod ask;
pub mod batch;
pub mod bytes;
pub mod complete;
pub mod demand;
pub mod exits;
pub mod fill;
pub mod huge;
pub mod install;
pub mod notice;
pub mod parked;
pub mod pin;
pub mod place;
pub mod poison;
pub mod retry;
pub mod settle;
pub mod shortage;
pub mod zero;
