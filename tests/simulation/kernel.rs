//! A kernel as far as the library uses it: mappings, page tables, shared files, userfaultfd, epoll, eventfd.
//!
//! Each call is one step, except where Linux lets others in between: those are points. Guest memory has addresses where
//! nothing is mapped, so that a touch by the library cannot go unnoticed.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

use ::kuf::sync::sim;
use libc::c_int;

use crate::model::Right;
use crate::trace;

pub const PAGE: u64 = 4096;
/// Descriptors of this kernel.
pub const FIRST_FD: c_int = 1 << 20;

pub type Answer<T> = Result<T, c_int>;

/// An entry of the page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    None,
    /// A page of its own that holds this word.
    Word(u64),
    /// The file's page.
    File,
    Poison,
}

/// A page of guest memory, mapped.
pub struct Page {
    /// The mmap(2) that made it.
    pub mapping: u64,
    /// The file and the page in it.
    pub file: Option<(usize, u64)>,
    pub entry: Entry,
    /// The userfaultfd it is registered with, and whether minor faults are.
    pub uffd: Option<(usize, bool)>,
    /// Faults that have looked at the mapping and still hold it.
    held: u32,
    pub closed: bool,
    /// MADV_FREE was called: the kernel may take the page.
    pub lazy: bool,
    /// The words that it may hold.
    pub right: Right,
    /// The library may change it: from kuf_add_memory to the end of kuf_remove_memory or kuf_close.
    pub lent: bool,
}

pub struct File {
    pub at: *mut u8,
    pub pages: Vec<bool>,
    links: u32,
    /// Memory that was the file's until a mapping of it was replaced: writes there go nowhere.
    cut_off: Vec<*mut u8>,
}

#[derive(Clone, Debug)]
struct Waiter {
    at: u64,
    flags: u64,
    thread: u32,
    task: usize,
    id: u64,
}

#[derive(Clone, Debug)]
struct Event {
    id: u64,
    task: usize,
    message: [u64; 4],
}

#[derive(Default)]
pub struct Uffd {
    links: u32,
    features: u64,
    pending: VecDeque<Waiter>,
    waiting: Vec<Waiter>,
    events: VecDeque<Event>,
    changing: u32,
}

#[derive(Default)]
struct Epoll {
    links: u32,
    items: Vec<Item>,
    waiting: Vec<usize>,
}

struct Item {
    fd: c_int,
    target: Target,
    data: u64,
    edge: bool,
    once: bool,
    ready: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Uffd(usize),
    Event(usize),
    Epoll(usize),
    File(usize),
    Text(usize),
    Pagemap,
}

pub struct Kernel {
    pub fds: BTreeMap<c_int, Target>,
    next_fd: c_int,
    pub pages: BTreeMap<u64, Page>,
    pub files: Vec<File>,
    pub uffds: Vec<Uffd>,
    counters: Vec<(u32, u64)>,
    epolls: Vec<Epoll>,
    texts: Vec<(Vec<u8>, usize)>,
    pollers: Vec<usize>,
    next_id: u64,
    /// The features that UFFDIO_API offers.
    pub offered: u64,
    /// UFFDIO_POISON works, as it does since Linux 6.6.
    pub poisons: bool,
    /// The time until which there is no memory.
    pub short_until: u64,
    /// A step takes its rare way once in this many times; 0: never.
    pub rare: u64,
    /// The kernel gives false answers now and then, and loses signals.
    pub lies: bool,
    /// At least this many answers are true from now on, so that a false answer is not repeated.
    honest: u32,
    /// A call of the library touched memory that is not lent to it.
    pub trespass: Option<String>,
    /// How often each thread had to wait; a wait that signals cut into pieces counts once.
    pub faulted: BTreeMap<u32, u64>,
}

thread_local! {
    static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) };
}

/// Whether a simulated kernel is running.
pub fn on() -> bool {
    KERNEL.with(|kernel| kernel.try_borrow().map_or(true, |kernel| kernel.is_some()))
}

pub fn with<T>(act: impl FnOnce(&mut Kernel) -> T) -> T {
    KERNEL.with(|kernel| act(kernel.borrow_mut().as_mut().expect("a kernel")))
}

pub fn boot(offered: u64, poisons: bool, rare: u64, lies: bool) {
    let kernel = Kernel {
        fds: BTreeMap::new(),
        next_fd: FIRST_FD,
        pages: BTreeMap::new(),
        files: Vec::new(),
        uffds: Vec::new(),
        counters: Vec::new(),
        epolls: Vec::new(),
        texts: Vec::new(),
        pollers: Vec::new(),
        next_id: 1,
        offered,
        poisons,
        short_until: 0,
        rare,
        lies,
        honest: 0,
        trespass: None,
        faulted: BTreeMap::new(),
    };
    KERNEL.with(|place| *place.borrow_mut() = Some(kernel));
}

pub fn halt() {
    KERNEL.with(|place| *place.borrow_mut() = None);
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: allocated by `new_file` with this layout.
        unsafe {
            std::alloc::dealloc(self.at, layout(self.pages.len()));
            self.cut_off.iter().for_each(|at| std::alloc::dealloc(*at, layout(self.pages.len())));
        }
    }
}

fn layout(pages: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(pages * PAGE as usize, PAGE as usize).expect("a size")
}

/// The word that fills a page; None if the page is not of one word.
pub fn word_at(at: *const u8) -> Option<u64> {
    // SAFETY: the caller's page.
    let words = unsafe { std::slice::from_raw_parts(at.cast::<u64>(), 512) };
    words.iter().all(|word| *word == words[0]).then_some(words[0])
}

/// The word of a page that holds parts of several words.
pub const TORN: u64 = 0xdead_dead_dead_dead;

pub fn fill_page(at: *mut u8, word: u64) {
    // SAFETY: the caller's page.
    unsafe { std::slice::from_raw_parts_mut(at.cast::<u64>(), 512) }.fill(word);
}

const API_FEATURE_REMAP: u64 = 1 << 2;
const API_FEATURE_REMOVE: u64 = 1 << 3;
const API_FEATURE_UNMAP: u64 = 1 << 6;
const API_FEATURE_THREAD_ID: u64 = 1 << 8;

impl Kernel {
    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn rarely(&self) -> bool {
        self.rare != 0 && sim::draw(self.rare) == 0
    }

    fn new_fd(&mut self, target: Target) -> c_int {
        let fd = self.next_fd;
        self.next_fd += 1;
        self.fds.insert(fd, target);
        match target {
            Target::Uffd(n) => self.uffds[n].links += 1,
            Target::Event(n) => self.counters[n].0 += 1,
            Target::Epoll(n) => self.epolls[n].links += 1,
            Target::File(n) => self.files[n].links += 1,
            Target::Text(_) | Target::Pagemap => {}
        }
        fd
    }

    pub fn target(&self, fd: c_int) -> Answer<Target> {
        self.fds.get(&fd).copied().ok_or(libc::EBADF)
    }

    pub fn dup(&mut self, fd: c_int) -> Answer<c_int> {
        let target = self.target(fd)?;
        Ok(self.new_fd(target))
    }

    pub fn close(&mut self, fd: c_int) -> Answer<()> {
        let target = self.fds.remove(&fd).ok_or(libc::EBADF)?;
        match target {
            Target::Uffd(n) => {
                self.uffds[n].links -= 1;
                if self.uffds[n].links == 0 {
                    self.release(n);
                }
            }
            Target::Event(n) => self.counters[n].0 -= 1,
            Target::Epoll(n) => self.epolls[n].links -= 1,
            Target::File(n) => self.files[n].links -= 1,
            Target::Text(_) | Target::Pagemap => {}
        }
        let last = !self.fds.values().any(|other| *other == target);
        for epoll in &mut self.epolls {
            epoll.items.retain(|item| !(last && item.target == target));
        }
        Ok(())
    }

    /// Closes the last descriptor of a userfaultfd: its waiters go on, and it catches no more faults.
    fn release(&mut self, n: usize) {
        for page in self.pages.values_mut().filter(|page| page.uffd.is_some_and(|(uffd, _)| uffd == n)) {
            page.uffd = None;
        }
        let uffd = &mut self.uffds[n];
        uffd.pending.drain(..).chain(uffd.waiting.drain(..)).for_each(|waiter| sim::ready(waiter.task));
        uffd.events.drain(..).for_each(|event| sim::ready(event.task));
    }

    pub fn new_uffd(&mut self) -> c_int {
        self.uffds.push(Uffd::default());
        self.new_fd(Target::Uffd(self.uffds.len() - 1))
    }

    pub fn new_eventfd(&mut self, count: u64) -> c_int {
        self.counters.push((0, count));
        self.new_fd(Target::Event(self.counters.len() - 1))
    }

    pub fn new_epoll(&mut self) -> c_int {
        self.epolls.push(Epoll::default());
        self.new_fd(Target::Epoll(self.epolls.len() - 1))
    }

    pub fn new_text(&mut self, text: Vec<u8>) -> c_int {
        self.texts.push((text, 0));
        self.new_fd(Target::Text(self.texts.len() - 1))
    }

    pub fn new_pagemap(&mut self) -> c_int {
        self.new_fd(Target::Pagemap)
    }

    pub fn new_file(&mut self, pages: usize) -> c_int {
        // SAFETY: a size above 0.
        let at = unsafe { std::alloc::alloc_zeroed(layout(pages)) };
        self.files.push(File { at, pages: vec![false; pages], links: 0, cut_off: Vec::new() });
        self.new_fd(Target::File(self.files.len() - 1))
    }

    // Readiness.

    fn readable(&self, target: Target) -> bool {
        match target {
            Target::Uffd(n) => !self.uffds[n].pending.is_empty() || !self.uffds[n].events.is_empty(),
            Target::Event(n) => self.counters[n].1 > 0,
            Target::Epoll(n) => self.epolls[n].items.iter().any(|item| item.ready && self.readable(item.target)),
            _ => true,
        }
    }

    /// Signals that a target became readable, or has more to read.
    fn signal(&mut self, target: Target) {
        if matches!(target, Target::Uffd(_)) && self.lies && self.rarely() && self.rarely() {
            trace!("a signal is lost");
            return;
        }
        for n in 0..self.epolls.len() {
            let epoll = &mut self.epolls[n];
            let mut any = false;
            for item in epoll.items.iter_mut().filter(|item| item.target == target) {
                item.ready = true;
                any = true;
            }
            if any {
                // One of the waiters is woken.
                if !epoll.waiting.is_empty() {
                    let at = sim::draw(epoll.waiting.len() as u64) as usize;
                    sim::ready(epoll.waiting.remove(at));
                }
            }
        }
        self.pollers.drain(..).for_each(sim::ready);
    }

    pub fn epoll_ctl(&mut self, epoll: c_int, op: c_int, fd: c_int, events: u32, data: u64) -> Answer<()> {
        let Target::Epoll(n) = self.target(epoll)? else { return Err(libc::EINVAL) };
        let target = self.target(fd)?;
        let at = self.epolls[n].items.iter().position(|item| item.fd == fd && item.target == target);
        match (op, at) {
            (libc::EPOLL_CTL_ADD, None) => {
                let (edge, once) = (events & libc::EPOLLET as u32 != 0, events & libc::EPOLLONESHOT as u32 != 0);
                let ready = self.readable(target);
                self.epolls[n].items.push(Item { fd, target, data, edge, once, ready });
                if ready {
                    self.epolls[n].waiting.drain(..).for_each(sim::ready);
                    self.pollers.drain(..).for_each(sim::ready);
                }
                Ok(())
            }
            (libc::EPOLL_CTL_ADD, Some(_)) => Err(libc::EEXIST),
            (libc::EPOLL_CTL_DEL, Some(at)) => {
                self.epolls[n].items.remove(at);
                Ok(())
            }
            (libc::EPOLL_CTL_MOD, Some(at)) => {
                let ready = self.readable(target);
                let item = &mut self.epolls[n].items[at];
                (item.data, item.edge, item.ready) = (data, events & libc::EPOLLET as u32 != 0, ready);
                Ok(())
            }
            _ => Err(libc::ENOENT),
        }
    }

    fn harvest(&mut self, n: usize, room: usize) -> Vec<u64> {
        let mut found = Vec::new();
        for at in 0..self.epolls[n].items.len() {
            let item = &self.epolls[n].items[at];
            if !item.ready || found.len() == room {
                continue;
            }
            let readable = self.readable(item.target);
            let item = &mut self.epolls[n].items[at];
            if readable {
                found.push(item.data);
            }
            item.ready = readable && !item.edge && !item.once;
        }
        found
    }

    // Mappings.

    /// Maps memory; `file`: shared, from that page of it on.
    pub fn map(&mut self, at: u64, pages: u64, file: Option<(usize, u64)>) {
        let mapping = self.id();
        for n in 0..pages {
            let page = Page {
                mapping,
                file: file.map(|(file, first)| (file, first + n)),
                entry: Entry::None,
                uffd: None,
                held: 0,
                closed: false,
                lazy: false,
                right: Right::new(0),
                lent: false,
            };
            self.pages.insert(at + n * PAGE, page);
        }
    }

    pub fn is_guest(&self, at: u64) -> bool {
        self.pages.contains_key(&(at & !(PAGE - 1))) || crate::guest::is_guest_address(at)
    }

    /// `/proc/self/maps`.
    pub fn maps(&self) -> Vec<u8> {
        use std::fmt::Write;
        let mut text = String::new();
        let mut pages = self.pages.iter().peekable();
        while let Some((start, page)) = pages.next() {
            let mut end = start + PAGE;
            while let Some((_, next)) = pages.next_if(|(at, next)| {
                **at == end && next.mapping == page.mapping && next.uffd.map(|u| u.0) == page.uffd.map(|u| u.0)
            }) {
                let _ = next;
                end += PAGE;
            }
            let _ = match page.file {
                Some((file, first)) => writeln!(
                    text,
                    "{start:x}-{end:x} rw-s {:08x} 00:01 {}                      /memfd:ram (deleted)",
                    first * PAGE,
                    1000 + file
                ),
                None => writeln!(text, "{start:x}-{end:x} rw-p 00000000 00:00 0 "),
            };
        }
        text.into_bytes()
    }

    fn word(&self, page: &Page) -> u64 {
        match (page.entry, page.file) {
            (Entry::Word(word), _) => word,
            (Entry::File, Some((file, n))) => self.file_word(file, n),
            _ => 0,
        }
    }

    pub fn file_word(&self, file: usize, n: u64) -> u64 {
        let file = &self.files[file];
        word_at(file.at.wrapping_add((n * PAGE) as usize)).unwrap_or(TORN)
    }

    /// Empties pages of a file, in every mapping.
    pub fn punch(&mut self, file: usize, first: u64, count: u64) {
        for n in first..(first + count).min(self.files[file].pages.len() as u64) {
            fill_page(self.files[file].at.wrapping_add((n * PAGE) as usize), 0);
            self.files[file].pages[n as usize] = false;
        }
        for page in self.pages.values_mut() {
            if page.entry == Entry::File
                && page.file.is_some_and(|(f, n)| f == file && (first..first + count).contains(&n))
            {
                page.entry = Entry::None;
            }
        }
    }

    /// Makes pages of a file exist.
    pub fn allocate(&mut self, file: usize, first: u64, count: u64) -> Answer<()> {
        for n in first..first + count {
            if !*self.files[file].pages.get(n as usize).ok_or(libc::EINVAL)? {
                if self.short() {
                    return Err(libc::ENOSPC);
                }
                self.files[file].pages[n as usize] = true;
            }
        }
        Ok(())
    }

    /// Which pages of a file a real address is in.
    pub fn file_at(&self, at: *const u8, len: usize) -> Option<(usize, u64, u64)> {
        let found = self.files.iter().position(|file| {
            at.addr() >= file.at.addr() && at.addr() + len <= file.at.addr() + file.pages.len() * PAGE as usize
        })?;
        let first = (at.addr() - self.files[found].at.addr()) as u64 / PAGE;
        Some((found, first, (len as u64).div_ceil(PAGE)))
    }

    /// Whether an address is in memory that was a file's.
    pub fn is_cut_off(&self, at: *const u8) -> bool {
        let within =
            |from: *mut u8, pages: usize| (from.addr()..from.addr() + pages * PAGE as usize).contains(&at.addr());
        self.files.iter().any(|file| file.cut_off.iter().any(|from| within(*from, file.pages.len())))
    }

    /// Replaces the mapping of a file by private memory: the file's pages move elsewhere.
    pub fn cut_off(&mut self, n: usize) {
        let file = &mut self.files[n];
        let pages = file.pages.len();
        // SAFETY: a size above 0, and as many bytes in both.
        let at = unsafe {
            let at = std::alloc::alloc_zeroed(layout(pages));
            std::ptr::copy_nonoverlapping(file.at, at, pages * PAGE as usize);
            at
        };
        file.cut_off.push(std::mem::replace(&mut file.at, at));
    }

    pub fn short(&self) -> bool {
        sim::now() < self.short_until
    }

    // userfaultfd.

    fn uffd(&self, fd: c_int) -> Answer<usize> {
        match self.target(fd)? {
            Target::Uffd(n) => Ok(n),
            _ => Err(libc::ENOTTY),
        }
    }

    pub fn uffd_api(&mut self, fd: c_int, features: u64) -> Answer<u64> {
        let n = self.uffd(fd)?;
        if features & !self.offered != 0 {
            return Err(libc::EINVAL);
        }
        self.uffds[n].features = features;
        Ok(self.offered)
    }

    fn check_range(&self, start: u64, len: u64) -> Answer<()> {
        if start % PAGE != 0 || len % PAGE != 0 || len == 0 {
            return Err(libc::EINVAL);
        }
        Ok(())
    }

    fn trespassing(&mut self, what: &str, at: u64) {
        if let Some(page) = self.pages.get(&at) {
            if !page.lent && self.trespass.is_none() {
                self.trespass = Some(format!("{what} at {at:#x}, which is not lent to the library"));
            }
        }
    }

    fn wake(&mut self, n: usize, start: u64, len: u64) {
        let uffd = &mut self.uffds[n];
        let here = |waiter: &Waiter| (start..start + len).contains(&waiter.at);
        let mut woken: Vec<usize> = Vec::new();
        uffd.pending.retain(|waiter| !here(waiter) || (woken.push(waiter.task), false).1);
        uffd.waiting.retain(|waiter| !here(waiter) || (woken.push(waiter.task), false).1);
        woken.into_iter().for_each(sim::ready);
    }

    /// Whether all of a range is one mapping under this userfaultfd.
    fn one_mapping(&self, n: usize, start: u64, len: u64) -> bool {
        let Some(first) = self.pages.get(&start) else { return false };
        let mut count = 0;
        self.pages
            .range(start..start + len)
            .take_while(|(_, page)| page.mapping == first.mapping && page.uffd.is_some_and(|(uffd, _)| uffd == n))
            .for_each(|_| count += 1);
        count == len / PAGE
    }

    fn message(&mut self, n: usize) -> Option<[u64; 4]> {
        const PAGEFAULT: u64 = 0x12;
        let uffd = &mut self.uffds[n];
        // Faults come before events, even if they were raised later.
        if let Some(waiter) = uffd.pending.pop_front() {
            let thread = if uffd.features & API_FEATURE_THREAD_ID != 0 { waiter.thread } else { 0 };
            let message = [PAGEFAULT, waiter.flags, waiter.at, u64::from(thread)];
            uffd.waiting.push(waiter);
            return Some(message);
        }
        let event = uffd.events.pop_front()?;
        sim::ready(event.task);
        Some(event.message)
    }
}

/// The word of a page of this process, read as the kernel does.
fn source_word(src: u64) -> Answer<u64> {
    let at = src as *const u8;
    if with(|kernel| kernel.is_guest(src)) {
        return with(|kernel| match kernel.pages.get(&(src & !(PAGE - 1))) {
            Some(page) if page.entry != Entry::None => Ok(kernel.word(page)),
            _ => Err(libc::EFAULT),
        });
    }
    if crate::caller::is_unreadable(src) {
        return Err(libc::EFAULT);
    }
    if src % 8 == 0 && is_readable(at) {
        return Ok(word_at(at).unwrap_or(TORN));
    }
    Err(libc::EFAULT)
}

/// Whether the byte can be read: the library has a page that is not readable.
fn is_readable(at: *const u8) -> bool {
    let mut byte = 0_u8;
    let local = libc::iovec { iov_base: std::ptr::from_mut(&mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: at.cast_mut().cast(), iov_len: 1 };
    // SAFETY: reads into `byte` only, and fails when it cannot.
    unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == 1 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Install {
    Copy { src: u64 },
    Zero,
    Continue,
    Poison,
}

fn install_page(n: usize, at: u64, what: Install, by: By) -> Answer<()> {
    let word = match what {
        Install::Copy { src } => source_word(src)?,
        _ => 0,
    };
    with(|kernel| {
        if by == By::Library {
            kernel.trespassing("an install", at);
        }
        let short = kernel.short();
        let page = kernel.pages.get(&at).ok_or(libc::ENOENT)?;
        if page.uffd.map(|(uffd, _)| uffd) != Some(n) {
            return Err(libc::ENOENT);
        }
        let (entry, file) = (page.entry, page.file);
        let minor = page.uffd.is_some_and(|(_, minor)| minor);
        if entry != Entry::None {
            return Err(libc::EEXIST);
        }
        let entry = match (what, file) {
            (Install::Poison, _) => Entry::Poison,
            (Install::Continue, Some((file, n))) if minor => {
                if !kernel.files[file].pages[n as usize] {
                    return Err(libc::EFAULT);
                }
                Entry::File
            }
            (Install::Continue, _) => return Err(libc::EINVAL),
            (_, Some((file, n))) => {
                if kernel.files[file].pages[n as usize] {
                    return Err(libc::EEXIST);
                }
                kernel.allocate(file, n, 1).map_err(|_| libc::ENOMEM)?;
                fill_page(kernel.files[file].at.wrapping_add((n * PAGE) as usize), word);
                Entry::File
            }
            (_, None) if short => return Err(libc::ENOMEM),
            (_, None) => Entry::Word(word),
        };
        kernel.pages.get_mut(&at).ok_or(libc::ENOENT)?.entry = entry;
        Ok(())
    })
}

/// As [`uffd_install`], called by the library: now and then the answer is false.
pub fn uffd_install_or_lie(fd: c_int, start: u64, len: u64, what: Install) -> (u64, Option<c_int>) {
    let lies = with(|kernel| {
        kernel.honest = kernel.honest.saturating_sub(1);
        let lies = kernel.lies && kernel.honest == 0 && kernel.rarely() && kernel.rarely();
        kernel.honest += if lies { 4 } else { 0 };
        lies
    });
    if lies {
        let errno = [libc::EEXIST, libc::ENOENT, libc::ESRCH][sim::draw(3) as usize];
        trace!("{what:?} {start:#x}+{len:#x}: {errno}, which is not so");
        return (0, Some(errno));
    }
    uffd_install(fd, start, len, what, By::Library)
}

/// UFFDIO_COPY, _ZEROPAGE, _CONTINUE and _POISON: bytes done, and the errno.
pub fn uffd_install(fd: c_int, start: u64, len: u64, what: Install, by: By) -> (u64, Option<c_int>) {
    sim::point();
    sim::pass(300);
    let begun = with(|kernel| {
        let n = kernel.uffd(fd)?;
        kernel.check_range(start, len)?;
        if kernel.uffds[n].changing > 0 {
            return Err(libc::EAGAIN);
        }
        if what == Install::Poison && !kernel.poisons {
            return Err(libc::EINVAL);
        }
        if !kernel.one_mapping(n, start, len) {
            return Err(libc::ENOENT);
        }
        Ok(n)
    });
    let n = match begun {
        Ok(n) => n,
        Err(errno) => return (0, Some(errno)),
    };
    let (mut done, mut errno) = (0, None);
    while done < len {
        if done > 0 && with(|kernel| kernel.rarely()) {
            sim::point();
            // A part is done, and a pending change of the mapping stops the rest.
            if with(|kernel| kernel.uffds[n].changing > 0 || kernel.rarely()) {
                errno = Some(libc::EAGAIN);
                break;
            }
        }
        let from = match what {
            Install::Copy { src } => Install::Copy { src: src + done },
            other => other,
        };
        if let Err(e) = install_page(n, start + done, from, by) {
            errno = Some(e);
            break;
        }
        done += PAGE;
    }
    let now: Vec<_> =
        with(|kernel| kernel.pages.range(start..start + done).map(|(_, page)| kernel.word(page)).collect());
    trace!("{what:?} {start:#x}+{len:#x}: {done:#x} {errno:?}, now {now:x?}");
    if done > 0 {
        // A thread that touches the page now goes on before the waiters are woken.
        sim::point();
        with(|kernel| kernel.wake(n, start, done));
        if errno.is_some() {
            errno = Some(libc::EAGAIN);
        }
    }
    (done, errno)
}

pub fn uffd_wake(fd: c_int, start: u64, len: u64) -> Answer<()> {
    sim::point();
    trace!("wake {start:#x}+{len:#x}");
    with(|kernel| {
        let n = kernel.uffd(fd)?;
        kernel.check_range(start, len)?;
        kernel.wake(n, start, len);
        Ok(())
    })
}

pub fn uffd_register(fd: c_int, start: u64, len: u64, mode: u64) -> Answer<()> {
    const MISSING: u64 = 1;
    const MINOR: u64 = 4;
    sim::point();
    trace!("register {start:#x}+{len:#x}");
    with(|kernel| {
        let n = kernel.uffd(fd)?;
        kernel.check_range(start, len)?;
        if mode & (MISSING | MINOR) == 0 {
            return Err(libc::EINVAL);
        }
        for at in (start..start + len).step_by(PAGE as usize) {
            let page = kernel.pages.get(&at).ok_or(libc::EINVAL)?;
            if page.uffd.is_some_and(|(other, _)| other != n) {
                return Err(libc::EBUSY);
            }
            if mode & MINOR != 0 && page.file.is_none() {
                return Err(libc::EINVAL);
            }
        }
        for at in (start..start + len).step_by(PAGE as usize) {
            kernel.trespassing("a registration", at);
            if let Some(page) = kernel.pages.get_mut(&at) {
                page.uffd = Some((n, mode & MINOR != 0));
            }
        }
        Ok(())
    })
}

/// Wakes the waiters, then waits for every fault that has seen the old mapping, then unregisters. Such a fault waits
/// for a wake-up that has already happened.
pub fn uffd_unregister(fd: c_int, start: u64, len: u64) -> Answer<()> {
    sim::point();
    trace!("unregister {start:#x}+{len:#x}");
    let n = with(|kernel| {
        let n = kernel.uffd(fd)?;
        kernel.check_range(start, len)?;
        if kernel.pages.range(start..start + len).next().is_none() {
            return Err(libc::EINVAL);
        }
        kernel.wake(n, start, len);
        Ok(n)
    })?;
    sim::point();
    while with(|kernel| kernel.pages.range(start..start + len).any(|(_, page)| page.held > 0)) {
        ::kuf::sync::thread::yield_now();
    }
    with(|kernel| {
        let ats: Vec<_> = kernel.pages.range(start..start + len).map(|(at, _)| *at).collect();
        for at in ats {
            kernel.trespassing("an unregistration", at);
            if let Some(page) = kernel.pages.get_mut(&at).filter(|page| page.uffd.is_some_and(|(uffd, _)| uffd == n)) {
                page.uffd = None;
            }
        }
        Ok(())
    })
}

/// read(2) of a userfaultfd.
pub fn uffd_read(n: usize, room: usize, mut put: impl FnMut(usize, [u64; 4])) -> Answer<usize> {
    sim::pass(200);
    if with(|kernel| kernel.rarely() && kernel.rarely()) {
        return Err(libc::EMFILE);
    }
    let mut count = 0;
    while count < room {
        let Some(message) = with(|kernel| kernel.message(n)) else { break };
        trace!("read of uffd {n}: {message:x?}");
        put(count, message);
        count += 1;
        if with(|kernel| kernel.rarely()) {
            sim::point();
        }
    }
    if count == 0 {
        return Err(libc::EAGAIN);
    }
    Ok(count)
}

/// An event is queued; the thread that caused it goes on when it has been read.
struct Queued {
    n: usize,
    id: u64,
}

fn queue(n: usize, message: [u64; 4]) -> Queued {
    let task = sim::current();
    let id = with(|kernel| {
        let id = kernel.id();
        kernel.uffds[n].events.push_back(Event { id, task, message });
        id
    });
    trace!("event on uffd {n}: {message:x?}");
    sim::point();
    with(|kernel| kernel.signal(Target::Uffd(n)));
    Queued { n, id }
}

impl Queued {
    fn wait(self) {
        // An event queued after the release waits for nothing.
        let unread = || {
            with(|kernel| {
                let uffd = &kernel.uffds[self.n];
                uffd.links > 0 && uffd.events.iter().any(|event| event.id == self.id)
            })
        };
        while unread() {
            sim::block("an event of its own to be read", None, false);
        }
        sim::point();
        with(|kernel| kernel.uffds[self.n].changing -= 1);
    }
}

/// The caller of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Guest,
    Library,
}

/// The runs of a range that are of one mapping and one userfaultfd.
fn pieces(start: u64, len: u64) -> Vec<(u64, u64, Option<usize>)> {
    with(|kernel| {
        let mut pieces: Vec<(u64, u64, Option<usize>, u64)> = Vec::new();
        for (at, page) in kernel.pages.range(start..start + len) {
            let uffd = page.uffd.map(|(uffd, _)| uffd);
            match pieces.last_mut().filter(|(s, l, u, m)| s + l == *at && *u == uffd && *m == page.mapping) {
                Some(last) => last.1 += PAGE,
                None => pieces.push((*at, PAGE, uffd, page.mapping)),
            }
        }
        pieces.into_iter().map(|(s, l, u, _)| (s, l, u)).collect()
    })
}

const MADV_FREE: c_int = 8;
const MADV_DONTNEED_LOCKED: c_int = 24;

pub fn madvise(start: u64, len: u64, advice: c_int, by: By) -> Answer<()> {
    const REMOVE: u64 = 0x15;
    sim::point();
    sim::pass(500);
    if !matches!(advice, libc::MADV_DONTNEED | libc::MADV_REMOVE | MADV_FREE | MADV_DONTNEED_LOCKED) {
        return Ok(());
    }
    trace!("madvise {advice} {start:#x}+{len:#x} by {by:?}");
    if with(|kernel| kernel.pages.range(start..start + len).count() as u64) < len / PAGE {
        return Err(libc::ENOMEM);
    }
    for (start, len, uffd) in pieces(start, len) {
        let shared = with(|kernel| kernel.pages.get(&start).is_some_and(|page| page.file.is_some()));
        if advice == libc::MADV_REMOVE && !shared || advice == MADV_FREE && shared {
            return Err(libc::EINVAL);
        }
        // The range may be registered with another userfaultfd by now, or with none.
        let now = |kernel: &Kernel| kernel.pages.get(&start).and_then(|page| page.uffd.map(|(uffd, _)| uffd));
        let uffd = uffd.and_then(|_| with(|kernel| now(kernel)));
        let events = |n: usize| with(|kernel| kernel.uffds[n].features & API_FEATURE_REMOVE != 0);
        if let Some(n) = uffd.filter(|n| events(*n)) {
            with(|kernel| kernel.uffds[n].changing += 1);
            queue(n, [REMOVE, start, start + len, 0]).wait();
        }
        // A fault may be served here, before the pages are dropped.
        sim::point();
        zap(start, len, advice, by);
    }
    Ok(())
}

fn zap(start: u64, len: u64, advice: c_int, by: By) {
    with(|kernel| {
        let ats: Vec<_> = kernel.pages.range(start..start + len).map(|(at, _)| *at).collect();
        for at in ats {
            if by == By::Library {
                kernel.trespassing("madvise", at);
            }
            let Some(page) = kernel.pages.get_mut(&at) else { continue };
            match (page.file, advice) {
                (Some((file, n)), libc::MADV_REMOVE) => {
                    if by == By::Guest {
                        page.right.dropped();
                    }
                    kernel.punch(file, n, 1);
                    continue;
                }
                (None, MADV_FREE) if matches!(page.entry, Entry::Word(_)) => page.lazy = true,
                (None, MADV_FREE) => page.entry = Entry::None,
                (file, _) => {
                    page.entry = Entry::None;
                    page.lazy = false;
                    if by == By::Guest && file.is_none() {
                        page.right.dropped();
                    }
                }
            }
        }
    });
}

/// munmap(2) by the caller's program.
pub fn munmap(start: u64, len: u64) {
    const UNMAP: u64 = 0x16;
    sim::point();
    let mut told: Vec<(usize, u64, u64)> = Vec::new();
    for (start, len, uffd) in pieces(start, len) {
        let events = |n: usize| with(|kernel| kernel.uffds[n].features & API_FEATURE_UNMAP != 0);
        if let Some(n) = uffd.filter(|n| events(*n)) {
            with(|kernel| kernel.uffds[n].changing += 1);
            told.push((n, start, start + len));
        }
    }
    trace!("munmap {start:#x}+{len:#x}");
    let held = || with(|kernel| kernel.pages.range(start..start + len).any(|(_, page)| page.held > 0));
    while held() {
        ::kuf::sync::thread::yield_now();
    }
    with(|kernel| {
        let ats: Vec<_> = kernel.pages.range(start..start + len).map(|(at, _)| *at).collect();
        ats.iter().for_each(|at| {
            kernel.pages.remove(at);
        });
    });
    // One after the other, in any order.
    while !told.is_empty() {
        let (n, start, end) = told.swap_remove(sim::draw(told.len() as u64) as usize);
        queue(n, [UNMAP, start, end, 0]).wait();
    }
}

/// mremap(2) to a place where nothing is.
pub fn mremap(start: u64, len: u64, to: u64) -> Answer<()> {
    const REMAP: u64 = 0x14;
    sim::point();
    let pieces = pieces(start, len);
    let &[(_, whole, uffd)] = &pieces[..] else { return Err(libc::EFAULT) };
    if whole != len {
        return Err(libc::EFAULT);
    }
    let events = |n: usize| with(|kernel| kernel.uffds[n].features & API_FEATURE_REMAP != 0);
    let uffd = uffd.filter(|n| events(*n));
    if let Some(n) = uffd {
        with(|kernel| kernel.uffds[n].changing += 1);
    }
    trace!("mremap {start:#x}+{len:#x} to {to:#x}");
    let held = || with(|kernel| kernel.pages.range(start..start + len).any(|(_, page)| page.held > 0));
    while held() {
        ::kuf::sync::thread::yield_now();
    }
    with(|kernel| {
        for at in (start..start + len).step_by(PAGE as usize) {
            if let Some(mut page) = kernel.pages.remove(&at) {
                if uffd.is_none() {
                    page.uffd = None;
                }
                kernel.pages.insert(at - start + to, page);
            }
        }
    });
    if let Some(n) = uffd {
        queue(n, [REMAP, start, to, len]).wait();
    }
    Ok(())
}

/// The outcome of a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// The word that was there.
    Word(u64),
    Sigbus,
    /// Nothing is mapped there.
    Segv,
}

/// The next step of a fault.
enum Fault {
    Done(Touched),
    Again,
    Wait(usize, u64),
}

/// A guest thread reads a page, or writes `write` over it. `patience`: a signal comes after so long a wait.
pub fn touch(thread: u32, at: u64, write: Option<u64>, patience: impl Fn() -> Option<u64>) -> Touched {
    let mut signalled = false;
    loop {
        sim::point();
        match fault(thread, at, write) {
            Fault::Done(touched) => return touched,
            Fault::Again => {}
            Fault::Wait(n, id) => {
                if !std::mem::take(&mut signalled) {
                    with(|kernel| *kernel.faulted.entry(thread).or_default() += 1);
                }
                let until = patience().map(|ns| sim::now() + ns);
                let waits = || {
                    with(|kernel| {
                        let uffd = &kernel.uffds[n];
                        uffd.pending.iter().chain(&uffd.waiting).any(|waiter| waiter.id == id)
                    })
                };
                while waits() && until.is_none_or(|until| sim::now() < until) {
                    sim::block("a page fault", until, false);
                }
                if waits() {
                    trace!("signal at {at:#x}");
                    signalled = true;
                    with(|kernel| {
                        let uffd = &mut kernel.uffds[n];
                        uffd.pending.retain(|waiter| waiter.id != id);
                        uffd.waiting.retain(|waiter| waiter.id != id);
                    });
                    sim::point();
                }
            }
        }
    }
}

fn fault(thread: u32, at: u64, write: Option<u64>) -> Fault {
    const WRITE: u64 = 1;
    const MINOR: u64 = 4;
    let caught = with(|kernel| {
        let Some(page) = kernel.pages.get_mut(&at) else { return Err(Fault::Done(Touched::Segv)) };
        if page.closed || page.entry == Entry::Poison {
            return Err(Fault::Done(Touched::Sigbus));
        }
        if page.lazy && sim::draw(2) == 0 {
            page.entry = Entry::None;
            page.lazy = false;
            page.right.dropped();
        }
        if page.entry != Entry::None {
            let word = kernel.access(at, write);
            return Err(Fault::Done(Touched::Word(word)));
        }
        let cached = page.file.is_some_and(|(file, n)| kernel.files[file].pages[n as usize]);
        let caught = page.uffd.filter(|(_, minor)| !cached || *minor);
        match caught {
            Some((n, _)) => {
                page.held += 1;
                Ok((n, cached))
            }
            None => {
                kernel.make(at);
                Err(Fault::Again)
            }
        }
    });
    let (n, cached) = match caught {
        Ok(caught) => caught,
        Err(fault) => return fault,
    };
    // The fault holds only its mapping here.
    sim::point();
    let id = with(|kernel| {
        let id = kernel.id();
        let flags = if write.is_some() { WRITE } else { 0 } | if cached { MINOR } else { 0 };
        let released = kernel.uffds[n].links == 0;
        let Some(page) = kernel.pages.get_mut(&at) else { return None };
        page.held -= 1;
        if released {
            return None;
        }
        // The page may have become present meanwhile.
        if page.entry != Entry::None {
            return None;
        }
        let waiter = Waiter { at, flags, thread, task: sim::current(), id };
        kernel.uffds[n].pending.push_back(waiter);
        Some(id)
    });
    let Some(id) = id else { return Fault::Again };
    trace!("fault at {at:#x}");
    sim::point();
    with(|kernel| kernel.signal(Target::Uffd(n)));
    Fault::Wait(n, id)
}

impl Kernel {
    /// Reads the word of a page, then writes it.
    fn access(&mut self, at: u64, write: Option<u64>) -> u64 {
        let Some(page) = self.pages.get(&at) else { return 0 };
        let word = self.word(page);
        let file = page.file;
        if let Some(write) = write {
            match file {
                Some((file, n)) => fill_page(self.files[file].at.wrapping_add((n * PAGE) as usize), write),
                None => {
                    if let Some(page) = self.pages.get_mut(&at) {
                        page.entry = Entry::Word(write);
                        page.lazy = false;
                    }
                }
            }
        }
        word
    }

    /// An ordinary fault: a page of zeroes, or the file's.
    fn make(&mut self, at: u64) {
        let file = self.pages.get(&at).and_then(|page| page.file);
        if let Some((file, n)) = file {
            self.files[file].pages[n as usize] = true;
        }
        if let Some(page) = self.pages.get_mut(&at) {
            page.entry = if file.is_some() { Entry::File } else { Entry::Word(0) };
        }
    }

    /// The outcome of a read of `at` that does not wait. None: the read would wait.
    pub fn look(&self, at: u64) -> Option<Touched> {
        let Some(page) = self.pages.get(&at) else { return Some(Touched::Segv) };
        if page.closed || page.entry == Entry::Poison {
            return Some(Touched::Sigbus);
        }
        match page.entry {
            Entry::None if page.uffd.is_some() => None,
            Entry::None => Some(Touched::Word(page.file.map_or(0, |(file, n)| self.file_word(file, n)))),
            _ => Some(Touched::Word(self.word(page))),
        }
    }
}

// Calls that wait.

/// epoll_wait(2).
pub fn epoll_wait(fd: c_int, room: usize, timeout_ns: Option<u64>) -> Answer<Vec<u64>> {
    sim::point();
    sim::pass(200);
    let n = match with(|kernel| kernel.target(fd))? {
        Target::Epoll(n) => n,
        _ => return Err(libc::EINVAL),
    };
    let until = timeout_ns.map(|ns| sim::now().saturating_add(ns));
    loop {
        let found = with(|kernel| kernel.harvest(n, room));
        if !found.is_empty() || until.is_some_and(|until| sim::now() >= until) {
            return Ok(found);
        }
        let me = sim::current();
        with(|kernel| kernel.epolls[n].waiting.push(me));
        sim::block("epoll_wait", until, false);
        with(|kernel| kernel.epolls[n].waiting.retain(|task| *task != me));
    }
}

/// poll(2) of one descriptor, for reading.
pub fn poll(fd: c_int, timeout_ns: Option<u64>) -> Answer<bool> {
    sim::point();
    let target = with(|kernel| kernel.target(fd))?;
    let until = timeout_ns.map(|ns| sim::now().saturating_add(ns));
    loop {
        if with(|kernel| kernel.readable(target)) {
            return Ok(true);
        }
        if until.is_some_and(|until| sim::now() >= until) {
            return Ok(false);
        }
        let me = sim::current();
        with(|kernel| kernel.pollers.push(me));
        sim::block("poll", until, false);
        with(|kernel| kernel.pollers.retain(|task| *task != me));
    }
}

/// read(2) and write(2) of a descriptor that is not a userfaultfd.
pub fn read(fd: c_int, room: &mut [u8]) -> Answer<usize> {
    sim::point();
    match with(|kernel| kernel.target(fd))? {
        Target::Event(n) => with(|kernel| {
            let count = std::mem::take(&mut kernel.counters[n].1);
            if count == 0 {
                return Err(libc::EAGAIN);
            }
            room[..8].copy_from_slice(&count.to_ne_bytes());
            Ok(8)
        }),
        Target::Text(n) => with(|kernel| {
            let (text, at) = &mut kernel.texts[n];
            let len = room.len().min(text.len() - *at);
            room[..len].copy_from_slice(&text[*at..*at + len]);
            *at += len;
            Ok(len)
        }),
        Target::Uffd(n) => {
            let most = room.len() / 32;
            let put = |at: usize, message: [u64; 4]| {
                for (to, word) in room[at * 32..(at + 1) * 32].chunks_exact_mut(8).zip(message) {
                    to.copy_from_slice(&word.to_ne_bytes());
                }
            };
            uffd_read(n, most, put).map(|count| count * 32)
        }
        _ => Err(libc::EINVAL),
    }
}

pub fn write(fd: c_int, bytes: &[u8]) -> Answer<usize> {
    sim::point();
    match with(|kernel| kernel.target(fd))? {
        Target::Event(n) => with(|kernel| {
            let count: [u8; 8] = bytes.get(..8).and_then(|bytes| bytes.try_into().ok()).ok_or(libc::EINVAL)?;
            kernel.counters[n].1 += u64::from_ne_bytes(count);
            kernel.signal(Target::Event(n));
            Ok(8)
        }),
        Target::Text(n) => with(|kernel| {
            kernel.texts[n].0.extend_from_slice(bytes);
            Ok(bytes.len())
        }),
        _ => Err(libc::EINVAL),
    }
}
