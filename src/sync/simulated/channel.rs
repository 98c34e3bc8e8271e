//! Queues between threads: each access is a point where another task may run.

pub use crossbeam_channel::{SendError, TryRecvError};

use super::sim::point;

pub struct Sender<T>(crossbeam_channel::Sender<T>);
pub struct Receiver<T>(crossbeam_channel::Receiver<T>);

/// As in `crossbeam_channel`.
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    let (send, receive) = crossbeam_channel::unbounded();
    (Sender(send), Receiver(receive))
}

impl<T> Sender<T> {
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        point();
        self.0.send(value)
    }
}

impl<T> Receiver<T> {
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        point();
        self.0.try_recv()
    }

    pub fn is_empty(&self) -> bool {
        point();
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        point();
        self.0.len()
    }
}
