//! The CPUs that service threads may run on.

use rustix::io::Errno;

use crate::alloc::try_collect;
use crate::error::{words, Error, Result};
use crate::os::worker::Worker;

/// A set of CPUs, laid out as sched_setaffinity(2) wants it.
#[derive(Debug, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

impl Cpus {
    /// The largest set that is accepted, in bytes: eight times as many CPUs as any kernel supports.
    pub const LARGEST: usize = 8192;

    /// Reads a set from its bytes. None: there is no CPU in it.
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

    /// The set of these CPUs. None: it is empty, or there is no such number.
    pub fn of_numbers(cpus: impl IntoIterator<Item = usize>) -> Option<Self> {
        let mut bytes = vec![0; Self::LARGEST];
        for cpu in cpus {
            *bytes.get_mut(cpu / 8)? |= 1 << (cpu % 8);
        }
        Self::from_bytes(&bytes)
    }

    /// The CPUs that the calling thread may use now.
    pub fn of_this_thread() -> Option<Self> {
        Self::of(0)
    }

    /// The CPUs that any thread of this process may use now.
    pub fn of_this_process() -> Self {
        let mut all = Self::of_this_thread().unwrap_or(Self(Vec::new()));
        let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
        for cpus in threads.filter_map(Self::of) {
            all.0.iter_mut().zip(cpus.0).for_each(|(word, more)| *word |= more);
        }
        all
    }

    /// The CPUs of the thread with this id; 0: of the calling thread.
    fn of(thread: libc::pid_t) -> Option<Self> {
        let mut words = try_collect(std::iter::repeat_n(0, Self::LARGEST / size_of::<usize>())).ok()?;
        // SAFETY: `words` has room for the number of bytes passed.
        let result = unsafe { libc::sched_getaffinity(thread, Self::LARGEST, words.as_mut_ptr().cast()) };
        (result >= 0).then_some(Self(words))
    }

    /// The number of CPUs.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Restricts a thread to these CPUs. An error names them as `what`.
    pub fn keep(&self, thread: &Worker, what: &str) -> Result<()> {
        // SAFETY: the set has the number of bytes passed; the thread has not been joined.
        let errno =
            unsafe { libc::pthread_setaffinity_np(thread.pthread(), size_of_val(&self.0[..]), self.0.as_ptr().cast()) };
        match errno {
            0 => Ok(()),
            libc::EINVAL => Err(Error::new(Errno::INVAL, words!("{what} names no CPU that this process may use"))),
            errno => Err(Error::system("sched_setaffinity of a service thread", Errno::from_raw_os_error(errno))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::worker::Name;

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
        let (go, wait) = crossbeam_channel::bounded::<()>(0);
        let (say, said) = crossbeam_channel::bounded(1);
        let body = move || {
            let _ = wait.recv();
            let _ = say.send(Cpus::of_this_thread());
        };
        let thread = Worker::start(Name::new(format_args!("kuf-test")), body).unwrap();
        one.keep(&thread, "one").unwrap();
        let mut none = vec![0; Cpus::LARGEST / size_of::<usize>()];
        *none.last_mut().unwrap() = 1;
        assert_eq!(Cpus(none).keep(&thread, "none").unwrap_err().errno(), Errno::INVAL);
        drop(go);
        thread.join();
        assert_eq!(said.recv(), Ok(Some(one)));
        assert_eq!(Cpus::of_this_process(), all);
    }
}
