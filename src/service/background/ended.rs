//! The events that end requests of populate and replays.

use rustix::io::Errno;

use crate::abi::*;
use crate::error::{words, Words};
use crate::service::background::{Step, Stopped};
use crate::service::fault::notice::Notice;
use crate::service::Work;

/// The event of a request.
pub fn populated(range: Option<(u64, u64)>, result: Step) -> Work {
    let (gpa, len) = range.unwrap_or((0, 0));
    let (error, text) = told("populate request", result);
    Work::Notice(Notice { slot: None, kind: KUF_EVENT_POPULATED, gpa, len, error, text })
}

/// The event of a replay.
pub fn replayed(result: Step) -> Work {
    let (error, text) = told("replay", result);
    Work::Notice(Notice { slot: None, kind: KUF_EVENT_REPLAYED, gpa: 0, len: 0, error, text })
}

/// How a request has ended, for its event.
fn told(what: &str, result: Step) -> (Option<Errno>, Words) {
    match result {
        Ok(()) => (None, words!("a {what} is done")),
        Err(Stopped::Failed(failure)) => (Some(failure.errno()), words!("a {what} ended early: {failure}")),
        Err(Stopped::Later) => {
            (Some(Errno::AGAIN), words!("a {what} is through: the fill callback left pages absent with KUF_FILL_LATER"))
        }
        Err(Stopped::Canceled) => (Some(Errno::CANCELED), words!("a {what} was stopped by KUF_POPULATE_STOP")),
        // These limits are of calls that end a slot or a handle.
        Err(Stopped::TimedOut | Stopped::GaveUp) => (Some(Errno::TIMEDOUT), words!("a {what} has come to its limits")),
    }
}
