//! A userfaultfd that fails as a test says: the test double over [`Userfaultfd`] and its bindings.

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::mapping::Region;
use crate::mechanism::over::{OverBinding, OverMechanism};
use crate::mechanism::userfaultfd::{Registered, Userfaultfd};
use crate::mechanism::{Binding, Content, ForKvm, Installed, Mechanism, Message, Stop, Stray};
use crate::pages::Pages;
use crate::service::tests::rig::{self, config, mapping, memory, wait_until, Caller, PAGE};
use crate::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use crate::sync::{thread, Arc, Mutex};

pub type Rig = rig::Rig<Faulty>;

/// The faults of this userfaultfd. A test changes them at any time.
#[derive(Default)]
pub struct Wrong {
    /// The kernel has no poison.
    pub no_poison: AtomicBool,
    /// Pages cannot be made inaccessible either.
    pub not_inaccessible: AtomicBool,
    /// Reads are refused with this errno; 0: they are not.
    pub no_read: AtomicI32,
    /// Installs still to be refused for want of memory.
    pub no_memory: AtomicU64,
    /// The next install panics.
    pub panic: AtomicBool,
    /// Installs of bytes are refused, as while other threads give memory back all the time.
    pub storm: AtomicBool,
    /// Its queue fills faster than the library reads it.
    pub flood: AtomicBool,
    /// Reads that find nothing although there is something.
    pub deaf: AtomicU64,
    /// How often it says that an event is on its way.
    pub restless: AtomicU64,
    /// There is no room for a page of a file.
    pub no_buffer: AtomicBool,
}

type Hook<T> = Mutex<Option<Box<dyn FnOnce() -> T + Send>>>;

pub struct Faulty {
    real: Arc<Userfaultfd>,
    pub wrong: Wrong,
    /// How often a place for a page of a file was asked for.
    pub buffers_asked: AtomicU64,
    /// Runs inside the next install of bytes, and returns its outcome.
    pub installing: Hook<Stop>,
    /// Runs while a slot is being added, before it is on the map.
    pub adding: Hook<()>,
    /// Runs when a slot is armed, and returns the error.
    pub arming: Hook<Error>,
}

/// Takes one off a count. Whether there was one.
fn one_of(count: &AtomicU64) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

impl OverMechanism for Faulty {
    type Under = Userfaultfd;

    fn under(&self) -> &Userfaultfd {
        &self.real
    }

    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<(), Errno> {
        if one_of(&self.wrong.deaf) {
            return Ok(());
        }
        match self.wrong.no_read.load(Ordering::SeqCst) {
            0 => self.real.read(queue, room, out).map(|()| {
                while self.wrong.flood.load(Ordering::SeqCst) && out.len() < room {
                    out.push(Message::Removed(0x1000..0x2000));
                }
            }),
            errno => Err(Errno::from_raw_os_error(errno)),
        }
    }

    fn is_quiet(&self, queue: usize) -> bool {
        !one_of(&self.wrong.restless) && self.real.is_quiet(queue)
    }

    fn bind(self: Arc<Self>, region: Arc<Region>, _kvm: ForKvm) -> Result<Box<dyn Binding>> {
        let adding = self.adding.lock().unwrap().take();
        adding.into_iter().for_each(|happens| happens());
        let under = Registered::new(self.real.clone(), region);
        Ok(Box::new(FaultyBinding { under, faulty: self }))
    }
}

/// A slot under it.
struct FaultyBinding {
    under: Registered,
    faulty: Arc<Faulty>,
}

impl OverBinding for FaultyBinding {
    type Under = Registered;

    fn under(&self) -> &Registered {
        &self.under
    }

    fn arm(&self, pages: &Pages) -> Result<()> {
        let refused = self.faulty.arming.lock().unwrap().take();
        refused.map_or_else(|| self.under.arm(pages), |happens| Err(happens()))
    }

    fn in_place_buffer(&self, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, Errno> {
        self.faulty.buffers_asked.fetch_add(1, Ordering::SeqCst);
        if self.faulty.wrong.no_buffer.load(Ordering::SeqCst) {
            return Err(Errno::NOMEM);
        }
        self.under.in_place_buffer(pages)
    }

    fn install(&self, pages: &Range<u64>, content: Content) -> Installed {
        assert!(!self.faulty.wrong.panic.swap(false, Ordering::SeqCst), "as the test wants it");
        let refused = |stop| Installed { pages: 0, stop: Some(stop) };
        let happens = if let Content::Copy(_) = content { self.faulty.installing.lock().unwrap().take() } else { None };
        if let Some(happens) = happens {
            return refused(happens());
        }
        if content.is_poison() && self.faulty.wrong.no_poison.load(Ordering::SeqCst) {
            return refused(Stop::Unsupported);
        }
        if !content.is_poison() && one_of(&self.faulty.wrong.no_memory) {
            return refused(Stop::NoMemory(Errno::NOMEM));
        }
        if !content.is_poison() && self.faulty.wrong.storm.load(Ordering::SeqCst) {
            return refused(Stop::Again);
        }
        self.under.install(pages, content)
    }

    fn make_inaccessible(&self, pages: &Range<u64>) -> bool {
        !self.faulty.wrong.not_inaccessible.load(Ordering::SeqCst) && self.under.make_inaccessible(pages)
    }
}

impl Faulty {
    /// Catches no touches of `hva` any more.
    pub fn disown_all(&self, hva: Range<u64>) {
        self.real.disown(Stray::Range(hva));
    }
}

/// A service over a faulty userfaultfd with one slot at gpa 0. None, after a line that says so, where this process gets no
/// userfaultfd.
pub fn rig() -> Option<Rig> {
    let Ok((real, _)) = Userfaultfd::open(true, true, false, 1) else {
        eprintln!("SKIP: no userfaultfd for this process");
        return None;
    };
    let faulty = Arc::new(Faulty {
        real: Arc::new(real),
        wrong: Wrong::default(),
        buffers_asked: AtomicU64::new(0),
        installing: Mutex::default(),
        adding: Mutex::default(),
        arming: Mutex::default(),
    });
    let caller = Arc::new(Caller::default());
    let config = config(&caller);
    Some(Rig::new(caller, config, &faulty, faulty.clone(), memory(mapping())))
}

impl Rig {
    /// Reads one byte of a page, on a thread of its own.
    pub fn touch(&self, page: u64) -> thread::JoinHandle<u8> {
        let at = self.hva + page * PAGE;
        // SAFETY: mapped for the life of the process; other threads only ever fill it.
        thread::spawn(move || unsafe { rig::address(at).cast::<u8>().read_volatile() })
    }

    /// Other threads give memory back all the time from now on, or no longer.
    pub fn storm(&self, begins: bool) {
        self.kernel.wrong.storm.store(begins, Ordering::SeqCst);
    }

    /// The queue has no end from now on, or has one.
    pub fn flood(&self, begins: bool) {
        self.kernel.wrong.flood.store(begins, Ordering::SeqCst);
    }

    /// Refuses the next `installs` for want of memory.
    pub fn refuse_for_memory(&self, installs: u64) {
        self.kernel.wrong.no_memory.store(installs, Ordering::SeqCst);
    }

    /// Says as many times that an event is on its way.
    pub fn be_restless(&self, times: u64) {
        self.kernel.wrong.restless.store(times, Ordering::SeqCst);
    }

    /// Fails unless the library asked until the userfaultfd was quiet.
    pub fn assert_asked_until_quiet(&self) {
        assert_eq!(self.kernel.wrong.restless.load(Ordering::SeqCst), 0, "the library asked until it was quiet");
    }

    /// Returns when an install of bytes was refused.
    pub fn wait_for_refusal(&self) {
        let before = self.service.stats().install_again;
        wait_until("an install is refused", || self.service.stats().install_again > before);
    }
}
