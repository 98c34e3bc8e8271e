//! Where service threads may run.

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use crate::error::{Error, Result};

/// A set of CPUs, laid out as sched_setaffinity(2) wants it.
#[derive(Debug, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

impl Cpus {
    /// The largest set that is taken, in bytes: eight times as many CPUs as any kernel is built for.
    pub const LARGEST: usize = 8192;

    /// Of the bytes of a set; None: there is no CPU in it.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        const WORD: usize = size_of::<usize>();
        let words = bytes.chunks(WORD).map(|part| {
            let mut word = [0; WORD];
            word[..part.len()].copy_from_slice(part);
            usize::from_ne_bytes(word)
        });
        let cpus = Self(words.collect());
        (cpus.count() > 0).then_some(cpus)
    }

    /// Those that the calling thread may use now.
    pub fn of_this_thread() -> Option<Self> {
        Self::of(0)
    }

    /// Those that some thread of this process may use now.
    pub fn of_this_process() -> Self {
        let mut all = Self::of_this_thread().unwrap_or(Self(Vec::new()));
        let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
        for cpus in threads.filter_map(Self::of) {
            all.0.iter_mut().zip(cpus.0).for_each(|(word, more)| *word |= more);
        }
        all
    }

    /// Of the thread with this id; 0: of this one.
    fn of(thread: libc::pid_t) -> Option<Self> {
        let mut words = vec![0; Self::LARGEST / size_of::<usize>()];
        // SAFETY: room for as many bytes as it is told.
        let result = unsafe { libc::sched_getaffinity(thread, Self::LARGEST, words.as_mut_ptr().cast()) };
        (result >= 0).then_some(Self(words))
    }

    /// How many.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Keeps a thread on these CPUs. `what` names them.
    pub fn keep<T>(&self, thread: &JoinHandle<T>, what: &str) -> Result<()> {
        // SAFETY: the words are as many bytes as it is told; the thread has not been joined.
        let errno = unsafe {
            libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&self.0[..]), self.0.as_ptr().cast())
        };
        match errno {
            0 => Ok(()),
            libc::EINVAL => Err(Error::new(libc::EINVAL, format!("{what} names no CPU that this process may use"))),
            errno => Err(Error::system("sched_setaffinity of a service thread", errno)),
        }
    }
}

/// How many userfaultfds a handle has that was not told.
pub fn userfaultfds_for(cpus: u32) -> usize {
    (cpus / 8).clamp(1, 8) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_a_cpu_and_any_length() {
        assert!(Cpus::from_bytes(&[0; 128]).is_none() && Cpus::from_bytes(&[]).is_none());
        assert_eq!(Cpus::from_bytes(&[2, 0, 0, 0, 0, 0, 0, 0, 1]).unwrap().count(), 2);
    }

    #[test]
    fn a_thread_stays_where_it_is_kept() {
        let all = Cpus::of_this_thread().unwrap();
        let last = all.0.iter().enumerate().rev().find(|(_, word)| **word != 0).unwrap();
        let mut one = vec![0; all.0.len()];
        one[last.0] = 1 << last.1.ilog2();
        let one = Cpus(one);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _ = wait.recv();
            Cpus::of_this_thread()
        });
        one.keep(&thread, "one").unwrap();
        let mut none = vec![0; Cpus::LARGEST / size_of::<usize>()];
        *none.last_mut().unwrap() = 1;
        assert_eq!(Cpus(none).keep(&thread, "none").unwrap_err().errno(), libc::EINVAL);
        drop(go);
        assert_eq!(thread.join().unwrap(), Some(one));
        assert_eq!(Cpus::of_this_process(), all);
    }

    #[test]
    fn few_cpus_need_one_userfaultfd() {
        for (cpus, count) in [(0, 1), (1, 1), (8, 1), (15, 1), (16, 2), (64, 8), (512, 8)] {
            assert_eq!(userfaultfds_for(cpus), count);
        }
    }
}
