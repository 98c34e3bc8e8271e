// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests that the system calls in `docs/seccomp.md` are enough, and that the library makes each call documented as always
//! made.
//!
//! The test runs itself as a child. The child opens its services, installs a filter of exactly the documented calls on all
//! its threads, where any other call kills it, and uses all functions of the library. For each documented call the test
//! runs another child whose filter lacks this call, which must kill the child.
//!
//! Under the filter the child's own code makes only calls that the library never makes (`CALLER`).

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void, CStr};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering::SeqCst};

use ::kuf::sys::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The child's own calls: sleep, print, handle a signal, exit, fork and wait.
const CALLER: [i64; 6] = [
    libc::SYS_pselect6,
    libc::SYS_writev,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit_group,
    libc::SYS_clone,
    libc::SYS_wait4,
];

/// The child's arguments: the part of the list, and the entry to leave out.
const PART: &str = "KUF_TEST_SECCOMP_PART";
const WITHOUT: &str = "KUF_TEST_SECCOMP_WITHOUT";
const NAMES_IT: &str = "KUF_TEST_SECCOMP_NAMES_IT";

/// Exit statuses of the child.
const SKIPPED: i32 = 77;
const FORBIDDEN: i32 = 78;

// ---- The document ---------------------------------------------------------------------------------------------------

/// Parts of the list: the calls of the running service, and those added by kuf_add_memory, kuf_remove_memory and
/// kuf_close; by following forks; by sources; by huge pages.
const SERVES: usize = 0;
const CHANGES: usize = 1;
const FORKS: usize = 2;
const SOURCES: usize = 3;
const HUGE: usize = 4;

/// A system call, or a system call with one value of one argument.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Entry {
    /// SERVES, CHANGES, FORKS, SOURCES or HUGE.
    part: usize,
    call: String,
    /// (index, value), as in struct seccomp_data.
    argument: Option<(u8, u64)>,
    always: bool,
}

impl Entry {
    fn name(&self) -> String {
        match self.argument {
            None => self.call.clone(),
            Some((index, value)) => format!("{}[{index}]={value:#x}", self.call),
        }
    }
}

/// Parses the rows of the tables: `| call | arguments | made | by | why |`.
fn documented() -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut part = SERVES;
    for line in include_str!("../docs/seccomp.md").lines() {
        part = match line {
            "## Calls made while the service runs" => SERVES,
            "## Calls that kuf_add_memory, kuf_remove_memory and kuf_close add" => CHANGES,
            "## Calls that KUF_OPEN_FOLLOW_FORK adds while the service runs" => FORKS,
            "## Calls that kuf_memory.source and kuf_fill.src add while the service runs" => SOURCES,
            "## Calls that KUF_MEMORY_HUGE adds while the service runs" => HUGE,
            other => {
                assert!(!other.starts_with("## "), "an unknown heading: {other}");
                part
            }
        };
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, call, arguments, made, _, _, _] = cells[..] else { continue };
        let Some(call) = call.strip_prefix('`').and_then(|call| call.strip_suffix('`')) else { continue };
        let always = match made {
            "always" => true,
            "sometimes" => false,
            other => panic!("{call}: made `{other}` instead of `always` or `sometimes`"),
        };
        let entry = |argument| Entry { part, call: call.to_owned(), argument, always };
        if arguments == "any" {
            entries.push(entry(None));
            continue;
        }
        let index = arguments.strip_prefix("args[").and_then(|rest| rest.get(..1)?.parse().ok());
        let index = index.unwrap_or_else(|| panic!("{call}: `{arguments}` names no argument"));
        let values = arguments.split([' ', ',', '(', ')']).filter_map(|word| word.strip_prefix("0x"));
        let before = entries.len();
        entries.extend(values.map(|hex| entry(Some((index, u64::from_str_radix(hex, 16).expect("hexadecimal"))))));
        assert!(entries.len() > before, "{call}: `{arguments}` gives no value");
    }
    for part in [SERVES, CHANGES, FORKS, SOURCES, HUGE] {
        assert!(entries.iter().any(|e| e.part == part), "a table of part {part}");
    }
    entries
}

/// Maps a name to a number. Some calls exist only on some architectures.
fn number(call: &str) -> Option<i64> {
    macro_rules! numbers {
        ($($name:ident)*) => { match call { $(stringify!($name) => Some(paste_number!($name)),)* _ => None } };
    }
    macro_rules! paste_number {
        (read) => {
            libc::SYS_read
        };
        (write) => {
            libc::SYS_write
        };
        (ioctl) => {
            libc::SYS_ioctl
        };
        (futex) => {
            libc::SYS_futex
        };
        (epoll_pwait) => {
            libc::SYS_epoll_pwait
        };
        (epoll_pwait2) => {
            libc::SYS_epoll_pwait2
        };
        (epoll_ctl) => {
            libc::SYS_epoll_ctl
        };
        (eventfd2) => {
            libc::SYS_eventfd2
        };
        (ppoll) => {
            libc::SYS_ppoll
        };
        (madvise) => {
            libc::SYS_madvise
        };
        (fallocate) => {
            libc::SYS_fallocate
        };
        (mincore) => {
            libc::SYS_mincore
        };
        (get_mempolicy) => {
            libc::SYS_get_mempolicy
        };
        (mbind) => {
            libc::SYS_mbind
        };
        (process_vm_readv) => {
            libc::SYS_process_vm_readv
        };
        (pipe2) => {
            libc::SYS_pipe2
        };
        (getpid) => {
            libc::SYS_getpid
        };
        (sched_yield) => {
            libc::SYS_sched_yield
        };
        (clock_nanosleep) => {
            libc::SYS_clock_nanosleep
        };
        (nanosleep) => {
            libc::SYS_nanosleep
        };
        (userfaultfd) => {
            libc::SYS_userfaultfd
        };
        (clock_gettime) => {
            libc::SYS_clock_gettime
        };
        (mmap) => {
            libc::SYS_mmap
        };
        (munmap) => {
            libc::SYS_munmap
        };
        (munlock) => {
            libc::SYS_munlock
        };
        (mremap) => {
            libc::SYS_mremap
        };
        (mprotect) => {
            libc::SYS_mprotect
        };
        (brk) => {
            libc::SYS_brk
        };
        (getrandom) => {
            libc::SYS_getrandom
        };
        (restart_syscall) => {
            libc::SYS_restart_syscall
        };
        (rseq) => {
            libc::SYS_rseq
        };
        (set_robust_list) => {
            libc::SYS_set_robust_list
        };
        (prctl) => {
            libc::SYS_prctl
        };
        (sched_getaffinity) => {
            libc::SYS_sched_getaffinity
        };
        (sigaltstack) => {
            libc::SYS_sigaltstack
        };
        (rt_sigprocmask) => {
            libc::SYS_rt_sigprocmask
        };
        (gettid) => {
            libc::SYS_gettid
        };
        (exit) => {
            libc::SYS_exit
        };
        (close) => {
            libc::SYS_close
        };
        (openat) => {
            libc::SYS_openat
        };
        (fcntl) => {
            libc::SYS_fcntl
        };
        (fstat) => {
            libc::SYS_fstat
        };
        (fstatfs) => {
            libc::SYS_fstatfs
        };
        (statx) => {
            libc::SYS_statx
        };
        (lseek) => {
            libc::SYS_lseek
        };
        (pread64) => {
            libc::SYS_pread64
        };
        (readlinkat) => {
            libc::SYS_readlinkat
        };
        (kcmp) => {
            libc::SYS_kcmp
        };
    }
    #[cfg(target_arch = "x86_64")]
    match call {
        "open" => return Some(libc::SYS_open),
        "readlink" => return Some(libc::SYS_readlink),
        _ => {}
    }
    numbers!(read write ioctl futex epoll_pwait epoll_pwait2 epoll_ctl eventfd2 ppoll madvise fallocate mincore process_vm_readv pipe2
        getpid sched_yield clock_nanosleep nanosleep clock_gettime userfaultfd mmap munmap munlock mremap mprotect brk getrandom restart_syscall rseq
        set_robust_list prctl sched_getaffinity sigaltstack rt_sigprocmask gettid exit close openat fcntl fstat fstatfs
        statx lseek pread64 readlinkat kcmp get_mempolicy mbind)
}

fn filter(part: usize, without: Option<&str>, otherwise: SeccompAction) -> BpfProgram {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLER.into_iter().map(|call| (call, Vec::new())).collect();
    let entries: Vec<Entry> = documented().into_iter().filter(|e| e.part == SERVES || e.part == part).collect();
    let mut seen = std::collections::BTreeSet::new();
    for entry in entries.iter().filter(|e| Some(e.name().as_str()) != without && seen.insert(e.name())) {
        let call = match number(&entry.call) {
            Some(call) => call,
            None if cfg!(target_arch = "x86_64") => panic!("{}: no such call", entry.call),
            None => continue,
        };
        let rule = entry.argument.map(|(index, value)| {
            let equal = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
            SeccompRule::new(vec![equal.expect("a condition")]).expect("a rule")
        });
        let mixed = rules.get(&call).is_some_and(|rules| rules.is_empty() || rule.is_none());
        assert!(!mixed, "{}: listed both with any argument and with a value", entry.call);
        rules.entry(call).or_default().extend(rule);
    }
    let arch = std::env::consts::ARCH.try_into().expect("an architecture that seccompiler knows");
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch).expect("rules").try_into().expect("a program")
}

// ---- The test -------------------------------------------------------------------------------------------------------

#[test]
fn the_documented_system_calls_are_enough_and_none_too_many() {
    if let Ok(part) = std::env::var(PART) {
        child(part.parse().expect("a part"));
    }
    let arch: Result<seccompiler::TargetArch, _> = std::env::consts::ARCH.try_into();
    if arch.is_err() {
        return println!("SKIP: seccompiler does not know this architecture");
    }
    // SAFETY: asks whether the kernel supports a filter action; reads one word.
    let known = unsafe {
        let kill = libc::SECCOMP_RET_KILL_PROCESS;
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const kill)
    };
    if known != 0 {
        let error = std::io::Error::last_os_error();
        return println!("SKIP: this process cannot install a seccomp filter that kills: {error}");
    }
    for part in [SERVES, CHANGES, FORKS, SOURCES, HUGE] {
        let (code, signal, said) = run(part, None, false);
        if code == Some(SKIPPED) {
            println!("{}", said.lines().find(|line| line.starts_with("SKIP")).unwrap_or("SKIP"));
            continue;
        }
        if signal == Some(libc::SIGSYS) {
            let (.., name) = run(part, None, true);
            panic!("part {part}: a system call that docs/seccomp.md does not list:\n{said}{name}");
        }
        assert!(code == Some(0), "part {part} under its filter ended with {code:?}, signal {signal:?}:\n{said}");
        let entries = documented();
        let entries: Vec<_> =
            entries.iter().filter(|e| e.part == part && e.always && number(&e.call).is_some()).collect();
        let idle: Vec<String> = entries
            .iter()
            .map(|e| e.name())
            .filter(|name| run(part, Some(name), false).1 != Some(libc::SIGSYS))
            .collect();
        assert!(
            idle.is_empty(),
            "part {part}: docs/seccomp.md says `always` for these, but the child passes without them: {idle:?}"
        );
        println!("part {part}: the list is enough, and each of {} entries is needed", entries.len());
    }
}

fn run(part: usize, without: Option<&str>, names_it: bool) -> (Option<i32>, Option<i32>, String) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "the_documented_system_calls_are_enough_and_none_too_many", "--nocapture"]);
    command.env(PART, part.to_string()).env_remove(WITHOUT).env_remove(NAMES_IT);
    if let Some(without) = without {
        command.env(WITHOUT, without);
    }
    if names_it {
        command.env(NAMES_IT, "1");
    }
    // SAFETY: two system calls that take no memory.
    unsafe {
        command.pre_exec(|| {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            Ok(())
        })
    };
    let output = command.output().expect("the child runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), output.status.signal(), said)
}

// ---- The child: under the filter it makes only system calls of CALLER and of the list ---------------------------------

fn say(text: &str) {
    let part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // SAFETY: reads the text.
    unsafe { libc::writev(2, &part, 1) };
}

fn leave(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::syscall(libc::SYS_exit_group, code) };
    unreachable!()
}

fn pause() {
    let time = libc::timespec { tv_sec: 0, tv_nsec: 200_000 };
    let none = null_mut::<c_void>();
    // SAFETY: reads `time`.
    unsafe { libc::syscall(libc::SYS_pselect6, 0, none, none, none, &raw const time, none) };
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        pause();
    }
}

/// Replaces assert, because a panic would read files for its backtrace.
fn check(good: bool, what: &str) {
    if !good {
        // SAFETY: kuf_error never returns NULL.
        let why = unsafe { CStr::from_ptr(kuf_error()) }.to_string_lossy();
        say(&format!("wrong: {what} (last error: {why})\n"));
        leave(1);
    }
}

extern "C" fn forbidden(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // si_syscall, after si_call_addr.
    // SAFETY: the kernel has filled in a siginfo of SIGSYS.
    let call = unsafe { info.cast::<u8>().add(24).cast::<c_int>().read() };
    say(&format!("system call number {call}\n"));
    leave(FORBIDDEN);
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread, started before the filter, that executes jobs one after another.
struct Helper {
    job: AtomicPtr<Job>,
    busy: AtomicBool,
}

impl Helper {
    fn start() -> &'static Self {
        let helper: &'static Self =
            Box::leak(Box::new(Self { job: AtomicPtr::new(null_mut()), busy: AtomicBool::new(false) }));
        std::thread::spawn(move || loop {
            let job = helper.job.swap(null_mut(), SeqCst);
            if job.is_null() {
                pause();
                continue;
            }
            // SAFETY: `give` made it, and only this thread takes it, once.
            let job = unsafe { Box::from_raw(job) };
            job();
            helper.busy.store(false, SeqCst);
        });
        helper
    }

    fn give(&self, job: impl FnOnce() + Send + 'static) {
        self.wait();
        self.busy.store(true, SeqCst);
        self.job.store(Box::into_raw(Box::new(Box::new(job))), SeqCst);
    }

    fn wait(&self) {
        wait_until(|| !self.busy.load(SeqCst));
    }
}

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const LEN: u64 = PAGES * PAGE;
/// Guest physical addresses of the serviced slots, by kind of memory, and of the others.
const PRIVATE: u64 = 1 << 32;
const FILE: u64 = 2 << 32;
const SHARED: u64 = 3 << 32;
const TOUCHED: u64 = 4 << 32;
const LATER: u64 = 5 << 32;

/// The result of the next fills.
static ANSWER: AtomicI32 = AtomicI32::new(KUF_FILL_DONE);

fn word(gpa: u64) -> u64 {
    gpa | 1
}

/// The `kuf_fill.src` of the next fills, if not NULL.
static ELSEWHERE: AtomicPtr<u64> = AtomicPtr::new(null_mut());

unsafe extern "C-unwind" fn fill(_opaque: *mut c_void, fill: *mut kuf_fill) -> c_int {
    let answer = ANSWER.load(SeqCst);
    let elsewhere = ELSEWHERE.load(SeqCst);
    if !elsewhere.is_null() {
        // SAFETY: the library passes a valid struct.
        unsafe { (*fill).src = elsewhere.cast() };
        return answer;
    }
    if answer == KUF_FILL_DONE {
        // SAFETY: the library passes a valid struct whose buf has room for len bytes.
        unsafe { write_pages((*fill).buf.cast(), (*fill).gpa, (*fill).len) };
    }
    answer
}

unsafe fn write_pages(at: *mut u64, gpa: u64, len: u64) {
    for offset in (0..len).step_by(8) {
        // SAFETY: the caller guarantees room for `len` bytes.
        unsafe { at.add(offset as usize / 8).write_volatile(word(gpa + offset)) };
    }
}

static POPULATED: AtomicU64 = AtomicU64::new(0);
static REPLAYED: AtomicU64 = AtomicU64::new(0);

unsafe extern "C-unwind" fn event(_opaque: *mut c_void, event: *const kuf_event) {
    // SAFETY: valid during the call.
    if unsafe { (*event).kind } == KUF_EVENT_POPULATED {
        POPULATED.fetch_add(1, SeqCst);
    }
    // SAFETY: as above.
    if unsafe { (*event).kind } == KUF_EVENT_REPLAYED {
        REPLAYED.fetch_add(1, SeqCst);
    }
}

fn zeroed<T>() -> T {
    // SAFETY: used only for structs of the C ABI, for which all-zero is the default.
    unsafe { std::mem::zeroed() }
}

#[derive(Clone, Copy)]
struct Handle(*mut kuf_handle);
// SAFETY: any thread may call any function with the handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

#[derive(Clone, Copy)]
struct Ram {
    at: u64,
    gpa: u64,
    fd: c_int,
}

impl Ram {
    fn new(gpa: u64, flags: c_int, file: bool) -> Self {
        // SAFETY: a new file and a new mapping.
        let (at, fd) = unsafe {
            let fd = if file { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) } else { -1 };
            check(!file || libc::ftruncate(fd, LEN as i64) == 0, "a memfd");
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(null_mut(), LEN as usize, prot, flags, fd, 0);
            check(at != libc::MAP_FAILED, "a mapping");
            libc::madvise(at, LEN as usize, libc::MADV_NOHUGEPAGE);
            (at as u64, fd)
        };
        Self { at, gpa, fd }
    }

    fn add_to(self, handle: Handle) {
        self.add_with(handle, null());
    }

    /// Makes a source for the slot's pages: a file whose first half holds words and whose second half is a hole.
    fn source(self) -> kuf_source {
        let mut words = vec![0_u64; (LEN / 2 / 8) as usize];
        // SAFETY: the vector has room for that half; the file is new.
        unsafe {
            write_pages(words.as_mut_ptr(), self.gpa, LEN / 2);
            let fd = libc::memfd_create(c"source".as_ptr(), libc::MFD_CLOEXEC);
            check(libc::ftruncate(fd, LEN as i64) == 0, "a file for a source");
            let wrote = libc::pwrite(fd, words.as_ptr().cast(), LEN as usize / 2, 0);
            check(wrote == LEN as isize / 2, "its bytes");
            kuf_source { size: size_of::<kuf_source>() as u32, kind: KUF_SOURCE_FILE, fd, ..zeroed() }
        }
    }

    fn add_with(self, handle: Handle, source: *const kuf_source) {
        let mut memory = kuf_memory { size: size_of::<kuf_memory>() as u32, ..zeroed() };
        (memory.gpa, memory.len, memory.hva) = (self.gpa, LEN, self.at);
        memory.source = source;
        memory.flags = KUF_MEMORY_POPULATED;
        if self.fd >= 0 {
            (memory.flags, memory.fd) = (KUF_MEMORY_POPULATED, self.fd);
        }
        // SAFETY: a handle and a struct.
        check(unsafe { kuf_add_memory(handle.0, &memory) } == 0, "kuf_add_memory");
    }

    fn gpa(self, page: u64) -> u64 {
        self.gpa + page * PAGE
    }

    fn read(self, page: u64) -> u64 {
        // SAFETY: the page is mapped.
        unsafe { ((self.at + page * PAGE) as *const u64).read_volatile() }
    }
}

fn open(flags: u32, serviced: bool) -> Handle {
    let mut options = kuf_options { size: size_of::<kuf_options>() as u32, flags, ..zeroed() };
    if serviced {
        options.demand_run = PAGE;
        options.fill = Some(fill);
        options.event = Some(event);
    }
    let mut handle = null_mut();
    // SAFETY: a struct and room for a handle.
    let mut got = unsafe { kuf_open(&options, &mut handle) };
    if got == -libc::EPERM && flags & KUF_OPEN_FOLLOW_FORK == 0 {
        options.flags |= KUF_OPEN_USER_MODE_ONLY;
        // SAFETY: as above.
        got = unsafe { kuf_open(&options, &mut handle) };
    }
    if matches!(-got, libc::EPERM | libc::ENOSYS | libc::ENOTSUP) {
        // SAFETY: kuf_error never returns NULL.
        println!("SKIP: kuf_open: {}", unsafe { CStr::from_ptr(kuf_error()) }.to_string_lossy());
        std::process::exit(SKIPPED);
    }
    check(got == 0, "kuf_open");
    Handle(handle)
}

/// The child's objects, created before the filter.
struct Setup {
    serviced: Handle,
    driven: Handle,
    direct: Handle,
    /// The slots of the serviced handle: PRIVATE, FILE, SHARED, TOUCHED.
    rams: [Ram; 4],
    driven_ram: [Ram; 2],
    direct_ram: Ram,
    /// Slots that the child adds under the filter.
    later: [Ram; 2],
    /// The sources of these slots.
    sources: [kuf_source; 2],
    /// The caller's own userfaultfd.
    uffd: c_int,
    /// Holds a recording until it is replayed.
    pipe: [c_int; 2],
    bytes: &'static [u64],
    touch: &'static Helper,
    call: &'static Helper,
}

fn child(part: usize) -> ! {
    // SAFETY: starts a timer whose signal ends the process if it hangs.
    unsafe { libc::alarm(100) };
    let (private, shared) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::MAP_SHARED);
    let rams = [
        Ram::new(PRIVATE, private, false),
        Ram::new(FILE, shared, true),
        Ram::new(SHARED, shared | libc::MAP_ANONYMOUS, false),
        Ram::new(TOUCHED, private, false),
    ];
    let later = [Ram::new(LATER, private, false), Ram::new(LATER + LEN, shared, true)];
    let setup = Setup {
        serviced: open(if part == FORKS { KUF_OPEN_FOLLOW_FORK } else { 0 }, true),
        driven: open(KUF_OPEN_CALLER_DRIVEN, false),
        direct: open(KUF_OPEN_DIRECT, false),
        rams,
        driven_ram: [Ram::new(PRIVATE, private, false), Ram::new(FILE, shared, true)],
        direct_ram: Ram::new(PRIVATE, private, false),
        later,
        sources: later.map(Ram::source),
        uffd: if part == CHANGES { userfaultfd() } else { -1 },
        pipe: pipe(),
        bytes: vec![0_u64; (LEN / 8) as usize].leak(),
        touch: Helper::start(),
        call: Helper::start(),
    };
    setup.rams[..3].iter().for_each(|ram| ram.add_to(setup.serviced));
    add_touched(setup.serviced, rams[3]);
    setup.driven_ram.iter().for_each(|ram| ram.add_to(setup.driven));
    setup.direct_ram.add_to(setup.direct);
    if part == SOURCES {
        setup.later.iter().zip(&setup.sources).for_each(|(ram, source)| ram.add_with(setup.serviced, source));
    }
    let huge = if part == HUGE { add_huge(&setup) } else { 0 };
    setup.touch.give(|| ());
    setup.call.give(|| ());
    setup.touch.wait();
    setup.call.wait();
    let without = std::env::var(WITHOUT).ok();
    let names_it = std::env::var_os(NAMES_IT).is_some();
    let otherwise = if names_it { SeccompAction::Trap } else { SeccompAction::KillProcess };
    if names_it {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = forbidden as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        // SAFETY: a handler that ends the process.
        unsafe { libc::sigaction(libc::SIGSYS, &action, null_mut()) };
    }
    if std::env::var_os("KUF_TEST_SECCOMP_OFF").is_none() {
        let program = filter(part, without.as_deref(), otherwise);
        check(seccompiler::apply_filter_all_threads(&program).is_ok(), "install the filter on all threads");
        std::mem::forget(program);
    }
    say("# the filter is on\n");
    serve(&setup);
    deferred(&setup);
    resolved(&setup);
    discarded(&setup);
    populated(&setup);
    replayed(&setup);
    poisoned(&setup);
    driven(&setup, setup.driven, setup.driven_ram[0]);
    driven(&setup, setup.driven, setup.driven_ram[1]);
    driven(&setup, setup.direct, setup.direct_ram);
    asked(&setup);
    match part {
        CHANGES => {
            comes_and_goes(&setup);
            adopts(&setup);
            closes(&setup);
        }
        FORKS => forks(&setup),
        SOURCES => sources(&setup),
        HUGE => populated_huge(&setup, huge),
        _ => {}
    }
    say("# done\n");
    leave(0);
}

fn touches(setup: &Setup, ram: Ram, pages: std::ops::Range<u64>, want: fn(u64) -> u64) {
    setup.touch.give(move || {
        for page in pages {
            check(ram.read(page) == want(ram.gpa(page)), "a touched page holds its bytes");
        }
    });
}

fn serve(setup: &Setup) {
    for ram in &setup.rams[..3] {
        touches(setup, *ram, 0..8, word);
        setup.touch.wait();
        ANSWER.store(KUF_FILL_ZERO, SeqCst);
        touches(setup, *ram, 8..10, |_| 0);
        setup.touch.wait();
        ANSWER.store(KUF_FILL_DONE, SeqCst);
        // SAFETY: a handle.
        unsafe {
            check(kuf_ensure(setup.serviced.0, ram.gpa(10), 2 * PAGE, -1) == 0, "kuf_ensure");
            check(kuf_vcpu_fault(setup.serviced.0, ram.gpa(12), PAGE, 0) == 0, "kuf_vcpu_fault");
        }
    }
}

fn owed(handle: Handle) -> isize {
    // SAFETY: a handle, no room.
    unsafe { kuf_pending(handle.0, null_mut(), 0) }
}

fn resolve(handle: Handle, gpa: u64, src: *const c_void, len: u64, flags: u32, what: &str) {
    // SAFETY: a handle, and `len` bytes or NULL.
    check(unsafe { kuf_resolve(handle.0, gpa, src, len, flags) } == len as isize, what);
}

fn bytes_for(setup: &Setup, gpa: u64, len: u64) -> *const c_void {
    let at = setup.bytes.as_ptr().cast_mut();
    // SAFETY: the buffer is as long as a slot, and only this thread uses it.
    unsafe { write_pages(at, gpa, len) };
    at.cast_const().cast()
}

fn deferred(setup: &Setup) {
    ANSWER.store(KUF_FILL_DEFERRED, SeqCst);
    for ram in &setup.rams[..3] {
        touches(setup, *ram, 16..17, word);
        wait_until(|| owed(setup.serviced) == 1);
        let (handle, gpa) = (setup.serviced, ram.gpa(16));
        setup.call.give(move || {
            let Handle(handle) = { handle };
            // SAFETY: a handle.
            let got = unsafe { kuf_ensure(handle, gpa, 1, -1) };
            check(got == 0, "kuf_ensure of a page that another thread waits for");
        });
        // Now the thread sleeps in kuf_ensure, or will find the page present.
        (0..20).for_each(|_| pause());
        resolve(setup.serviced, gpa, bytes_for(setup, gpa, PAGE), PAGE, 0, "kuf_resolve of a deferred page");
        setup.call.wait();
        setup.touch.wait();
    }
    ANSWER.store(KUF_FILL_DONE, SeqCst);
}

fn resolved(setup: &Setup) {
    for ram in &setup.rams[..3] {
        let gpa = ram.gpa(20);
        resolve(setup.serviced, gpa, bytes_for(setup, gpa, 4 * PAGE), 4 * PAGE, 0, "kuf_resolve unasked");
        resolve(setup.serviced, ram.gpa(24), null(), PAGE, KUF_RESOLVE_ZERO, "kuf_resolve of zeroes");
        touches(setup, *ram, 20..24, word);
        touches(setup, *ram, 24..25, |_| 0);
        setup.touch.wait();
    }
    let gpa = setup.rams[0].gpa(20);
    // SAFETY: a handle.
    let found = unsafe { kuf_resolve(setup.serviced.0, gpa, null(), 8 * PAGE, KUF_RESOLVE_PRESENT) };
    check(found == 0, "kuf_resolve of present pages finds no new one");
}

fn discarded(setup: &Setup) {
    for ram in &setup.rams[..3] {
        // SAFETY: a handle.
        unsafe {
            check(kuf_discard(setup.serviced.0, ram.gpa(0), PAGE, KUF_DISCARD_REFILL) == 0, "kuf_discard");
            check(kuf_discard(setup.serviced.0, ram.gpa(1), PAGE, KUF_DISCARD_ZERO) == 0, "kuf_discard as removed");
        }
        touches(setup, *ram, 0..1, word);
        touches(setup, *ram, 1..2, |_| 0);
        setup.touch.wait();
    }
}

fn populated(setup: &Setup) {
    let before = POPULATED.load(SeqCst);
    let mut request = kuf_populate_request { size: size_of::<kuf_populate_request>() as u32, ..zeroed() };
    (request.gpa, request.len) = (TOUCHED, LEN);
    // SAFETY: a handle and a struct.
    check(unsafe { kuf_populate(setup.serviced.0, &request) } == 0, "kuf_populate");
    (request.gpa, request.len, request.rate) = (FILE + 32 * PAGE, 16 * PAGE, 64 << 20);
    // SAFETY: as above.
    check(unsafe { kuf_populate(setup.serviced.0, &request) } == 0, "kuf_populate at a rate");
    wait_until(|| POPULATED.load(SeqCst) == before + 2);
    touches(setup, setup.rams[3], 0..PAGES, word);
    touches(setup, setup.rams[1], 32..48, word);
    setup.touch.wait();
    let mut stats = kuf_stats_info { size: size_of::<kuf_stats_info>() as u32, ..zeroed() };
    // SAFETY: a handle and a struct.
    check(unsafe { kuf_stats(setup.serviced.0, &mut stats) } == 0, "kuf_stats");
    check(stats.install_exists > 0, "installs found pages present");
}

/// Makes a pipe with two non-blocking ends, so that its users have to retry.
fn pipe() -> [c_int; 2] {
    let mut pipe = [-1; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } == 0, "a pipe");
    pipe
}

fn replayed(setup: &Setup) {
    let (serviced, gpa) = (setup.serviced, setup.rams[0].gpa(PAGES - 1));
    let [from, to] = setup.pipe;
    setup.call.give(move || {
        let Handle(handle) = { serviced };
        // SAFETY: a handle.
        let got = unsafe { kuf_replay(handle, from, 0) };
        check(got == 0, "kuf_replay, after there are bytes to read");
    });
    let Handle(handle) = serviced;
    // SAFETY: a handle.
    unsafe {
        check(kuf_record_start(handle, 0) == 0, "kuf_record_start");
        check(kuf_ensure(handle, gpa, PAGE, -1) == 0, "kuf_ensure of a page to be recorded");
        check(kuf_discard(handle, gpa, PAGE, KUF_DISCARD_REFILL) == 0, "kuf_discard of it");
        check(kuf_record_stop(handle, to) == 0, "kuf_record_stop");
    }
    setup.call.wait();
    wait_until(|| REPLAYED.load(SeqCst) == 1);
}

fn poisoned(setup: &Setup) {
    ANSWER.store(-libc::EIO, SeqCst);
    for ram in &setup.rams[..3] {
        // SAFETY: a handle.
        unsafe {
            check(kuf_ensure(setup.serviced.0, ram.gpa(30), PAGE, -1) == -libc::EHWPOISON, "kuf_ensure of a bad page");
        }
        resolve(setup.serviced, ram.gpa(31), null(), PAGE, KUF_RESOLVE_POISON, "kuf_resolve with poison");
    }
    ANSWER.store(KUF_FILL_DONE, SeqCst);
}

fn driven(setup: &Setup, handle: Handle, ram: Ram) {
    // SAFETY: a handle.
    unsafe {
        check(kuf_poll(handle.0, 0) == 0 && kuf_poll(handle.0, 1) == 0, "kuf_poll without a fault");
        check(kuf_fd(handle.0) >= 0, "kuf_fd");
    }
    touches(setup, ram, 0..4, word);
    for page in 0..4 {
        let mut fault: kuf_fault = zeroed();
        // SAFETY: a handle and room for one.
        unsafe {
            check(kuf_poll(handle.0, -1) == 1, "kuf_poll");
            let mut got;
            while {
                got = kuf_read(handle.0, &mut fault, 1);
                got == -libc::EAGAIN as isize
            } {
                check(kuf_poll(handle.0, -1) == 1, "kuf_poll again");
            }
            check(got == 1 && fault.gpa == ram.gpa(page), "kuf_read returns the touched page");
            let (mut src, mut flags) = (bytes_for(setup, fault.gpa, PAGE), 0);
            if !fault.place.is_null() && page % 2 == 1 {
                write_pages(fault.place.cast(), fault.gpa, PAGE);
                (src, flags) = (null(), KUF_RESOLVE_IN_PLACE);
            }
            resolve(handle, fault.gpa, src, PAGE, flags, "kuf_resolve of the fault");
        }
    }
    setup.touch.wait();
}

fn asked(setup: &Setup) {
    for handle in [setup.serviced, setup.driven, setup.direct] {
        let mut progress = kuf_progress_info { size: size_of::<kuf_progress_info>() as u32, ..zeroed() };
        let mut stats = kuf_stats_info { size: size_of::<kuf_stats_info>() as u32, ..zeroed() };
        let mut settings = kuf_settings_info { size: size_of::<kuf_settings_info>() as u32, ..zeroed() };
        // SAFETY: a handle, and structs or no room.
        unsafe {
            check(kuf_settings(handle.0, KUF_ALL, &mut settings) == 0, "kuf_settings");
            check(kuf_progress(handle.0, KUF_ALL, &mut progress) == 0, "kuf_progress");
            check(kuf_stats(handle.0, &mut stats) == 0 && stats.faults > 0, "kuf_stats");
            check(kuf_block_times(handle.0, null_mut(), 0) >= 0, "kuf_block_times");
            check(kuf_progress(handle.0, 1, &mut progress) == -libc::ENOENT, "kuf_progress of an unknown slot");
        }
    }
}

fn comes_and_goes(setup: &Setup) {
    for (ram, source) in setup.later.into_iter().zip(&setup.sources) {
        ram.add_with(setup.serviced, source);
        // SAFETY: a handle.
        let got = unsafe { kuf_remove_memory(setup.serviced.0, ram.gpa, KUF_END_POISON) };
        check(got == 0, "kuf_remove_memory of a slot with a source");
        // SAFETY: as above; poisoned pages become ordinary memory for the next slot.
        check(unsafe { libc::madvise(ram.at as *mut c_void, LEN as usize, libc::MADV_DONTNEED) } == 0, "madvise");
        for _ in 0..2 {
            ram.add_to(setup.serviced);
            touches(setup, ram, 0..8, word);
            setup.touch.wait();
            // SAFETY: a handle.
            let got = unsafe { kuf_remove_memory(setup.serviced.0, ram.gpa, KUF_END_POPULATE) };
            check(got == 0, "kuf_remove_memory");
        }
    }
}

fn sources(setup: &Setup) {
    for ram in setup.later {
        touches(setup, ram, 0..PAGES / 2, word);
        setup.touch.wait();
        touches(setup, ram, PAGES / 2..PAGES, |_| 0);
        setup.touch.wait();
    }
    // Pages of zeroes in the callback's slots, private and in place.
    static PAGE_OF_ZEROES: [u64; PAGE as usize / 8] = [0; PAGE as usize / 8];
    ELSEWHERE.store(PAGE_OF_ZEROES.as_ptr().cast_mut(), SeqCst);
    for ram in &setup.rams[..2] {
        // SAFETY: a handle.
        check(unsafe { kuf_discard(setup.serviced.0, ram.gpa(50), 2 * PAGE, KUF_DISCARD_REFILL) } == 0, "kuf_discard");
        touches(setup, *ram, 50..52, |_| 0);
        setup.touch.wait();
    }
    ELSEWHERE.store(null_mut(), SeqCst);
}

const HUGE_PAGE: u64 = 2 << 20;
const HUGE_GPA: u64 = 1 << 40;

/// Adds a slot of two huge pages and returns its address.
fn add_huge(setup: &Setup) -> u64 {
    let mut probe = kuf_probe_info { size: size_of::<kuf_probe_info>() as u32, ..zeroed() };
    // SAFETY: a struct of the size that it says.
    check(unsafe { kuf_probe(-1, &mut probe) } == 0, "kuf_probe");
    if probe.features & KUF_FEATURE_HUGE == 0 {
        println!("SKIP: this machine cannot move huge pages");
        std::process::exit(SKIPPED);
    }
    let mut memory = kuf_memory { size: size_of::<kuf_memory>() as u32, flags: KUF_MEMORY_HUGE, ..zeroed() };
    // SAFETY: a new mapping, a handle and a struct.
    unsafe {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let at = libc::mmap(null_mut(), 3 * HUGE_PAGE as usize, prot, flags, -1, 0);
        check(at != libc::MAP_FAILED, "a mapping");
        (memory.gpa, memory.len, memory.hva) = (HUGE_GPA, 2 * HUGE_PAGE, (at as u64).next_multiple_of(HUGE_PAGE));
        check(kuf_add_memory(setup.serviced.0, &memory) == 0, "kuf_add_memory with huge pages");
    }
    memory.hva
}

fn populated_huge(setup: &Setup, at: u64) {
    let before = POPULATED.load(SeqCst);
    let mut request = kuf_populate_request { size: size_of::<kuf_populate_request>() as u32, ..zeroed() };
    (request.gpa, request.len) = (HUGE_GPA, 2 * HUGE_PAGE);
    // SAFETY: a handle and a struct.
    check(unsafe { kuf_populate(setup.serviced.0, &request) } == 0, "kuf_populate of huge pages");
    wait_until(|| POPULATED.load(SeqCst) > before);
    let ram = Ram { at, gpa: HUGE_GPA, fd: -1 };
    touches(setup, ram, 0..2 * HUGE_PAGE / PAGE, word);
    setup.touch.wait();
}

/// Opens a userfaultfd and calls UFFDIO_API without features.
fn userfaultfd() -> c_int {
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: a new descriptor, and a struct of three words.
    unsafe {
        let mut fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) as c_int;
        if fd < 0 {
            fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) as c_int;
        }
        check(fd >= 0 && libc::ioctl(fd, 0xc018_aa3f_u32 as _, api.as_mut_ptr()) == 0, "the caller's userfaultfd");
        fd
    }
}

/// Adds a slot on the caller's userfaultfd. The caller fills some of its pages without telling the library.
fn add_touched(handle: Handle, ram: Ram) {
    let uffd = userfaultfd();
    let mut memory = kuf_memory { size: size_of::<kuf_memory>() as u32, ..zeroed() };
    (memory.gpa, memory.len, memory.hva) = (ram.gpa, LEN, ram.at);
    (memory.flags, memory.uffd) = (KUF_MEMORY_POPULATED, uffd);
    let mut words = vec![0_u64; (8 * PAGE / 8) as usize];
    let mut copy = [ram.at, words.as_mut_ptr() as u64, 8 * PAGE, 0, 0];
    // SAFETY: a handle and a struct; room for eight pages; UFFDIO_COPY takes five words.
    unsafe {
        check(kuf_add_memory(handle.0, &memory) == 0, "kuf_add_memory of memory that the caller fills");
        write_pages(words.as_mut_ptr(), ram.gpa, 8 * PAGE);
        check(libc::ioctl(uffd, 0xc028_aa03_u32 as _, copy.as_mut_ptr()) == 0, "UFFDIO_COPY");
    }
}

fn adopts(setup: &Setup) {
    // Two slots on one userfaultfd: the library recognises the second by it.
    for (ram, from) in [(setup.later[0], 0), (setup.later[0], LEN / 2)] {
        let mut memory = kuf_memory { size: size_of::<kuf_memory>() as u32, ..zeroed() };
        (memory.gpa, memory.len, memory.hva) = (ram.gpa + from, LEN / 2, ram.at + from);
        (memory.flags, memory.uffd) = (0, setup.uffd);
        // SAFETY: a handle and a struct; no thread uses the memory.
        unsafe {
            libc::madvise(memory.hva as *mut c_void, memory.len as usize, libc::MADV_DONTNEED);
            check(kuf_add_memory(setup.serviced.0, &memory) == 0, "kuf_add_memory with a userfaultfd");
        }
    }
    touches(setup, setup.later[0], 0..PAGES, word);
    setup.touch.wait();
}

fn forks(setup: &Setup) {
    let untouched = [40, 41, 42];
    for page in untouched {
        for _ in 0..2 {
            // SAFETY: like fork without its handlers; the child reads one word and ends.
            let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as libc::pid_t;
            if child == 0 {
                let good = setup.rams[0].read(page) == word(setup.rams[0].gpa(page));
                leave(i32::from(!good));
            }
            let mut status = 0;
            // SAFETY: room for a status.
            let got = unsafe { libc::syscall(libc::SYS_wait4, child, &raw mut status, 0, null_mut::<c_void>()) };
            check(got == i64::from(child) && status == 0, "a forked child reads the bytes of its page");
        }
    }
}

fn closes(setup: &Setup) {
    for (handle, flags) in [
        (setup.serviced, KUF_END_POPULATE | KUF_END_POISON),
        (setup.driven, KUF_END_POISON),
        (setup.direct, KUF_END_POISON),
    ] {
        let cell = UnsafeCell::new(handle.0);
        // SAFETY: the last use of the handle.
        check(unsafe { kuf_close(cell.get(), flags) } == 0, "kuf_close");
    }
}
