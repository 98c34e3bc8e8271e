//! From the C structs to the library's own types, and back.

use std::ffi::c_void;
use std::mem::{size_of, MaybeUninit};
use std::time::Duration;

use super::types::*;
use crate::error::{Error, Result};
use crate::mechanism::kvm_bitmap::Memslot;
use crate::memory::Opaque;
use crate::service::config::{Config, Host, NewMemory, NewPopulate, NewSource, Resolution, Which};
use crate::service::cpus::{userfaultfds_for, Cpus};
use crate::service::duplicate_vm;
use crate::source::check_len as check_source_len;
use crate::uapi::kvm::{KVM_MEMORY_ATTRIBUTE_USERFAULT, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};

/// A struct that starts with its `size`.
///
/// # Safety
/// `repr(C)`, first field `size: u32`, and every bit pattern of the rest is a value.
pub unsafe trait Sized32: Copy {
    /// Its size in the first version of the library.
    const FIRST: usize;
}

macro_rules! sized {
    ($($name:ident: $first:expr),* $(,)?) => {
        $(
            // SAFETY: see `types`: repr(C), size first, integers, pointers and optional functions after.
            unsafe impl Sized32 for $name {
                const FIRST: usize = $first;
            }
            const _: () = assert!(size_of::<$name>() >= $first && std::mem::offset_of!($name, size) == 0);
        )*
    };
}

// The sizes of KUF_0.1: once released they never change.
sized! {
    kuf_options: 136,
    kuf_memory: 88,
    kuf_source: 48,
    kuf_populate: 32,
    kuf_probe: 2088,
    kuf_progress: 72,
    kuf_stats: 1616,
}

const _: () = assert!(size_of::<kuf_fault>() == 64);

/// What a memslot that the library sets may have besides KVM_MEM_USERFAULT.
const MEMSLOT_FLAGS: u32 = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;

/// Larger than any struct will ever grow: a size beyond it is no size.
const SENSE: usize = 1 << 16;

/// Takes a struct of whatever version the caller was compiled with.
///
/// # Safety
/// `from` is NULL or points to as many readable bytes as its `size` says.
pub unsafe fn read_struct<T: Sized32>(from: *const T, name: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_struct(from, name) }?;
    // SAFETY: `size` bytes are readable, and the buffer has room for what is copied.
    unsafe {
        let mut value = MaybeUninit::<T>::zeroed();
        let known = size.min(size_of::<T>());
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known);
        let tail = std::slice::from_raw_parts(from.cast::<u8>().add(known), size - known);
        if tail.iter().any(|byte| *byte != 0) {
            let text = format!("{name} sets fields this version of the library does not know");
            return Err(Error::new(libc::E2BIG, text));
        }
        Ok(value.assume_init())
    }
}

/// Fills a struct of whatever version the caller was compiled with. `make` is given the size to put into it.
///
/// # Safety
/// `to` is NULL or points to as many writable bytes as its `size` says.
pub unsafe fn write_struct<T: Sized32>(to: *mut T, name: &str, make: impl FnOnce(u32) -> Result<T>) -> Result<i32> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_struct(to, name) }?;
    let value = make(size as u32)?;
    // SAFETY: `size` bytes are writable.
    unsafe {
        let known = size.min(size_of::<T>());
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), to.cast::<u8>(), known);
        std::ptr::write_bytes(to.cast::<u8>().add(known), 0, size - known);
    }
    Ok(0)
}

unsafe fn size_of_struct<T: Sized32>(at: *const T, name: &str) -> Result<usize> {
    if at.is_null() {
        return Err(Error::new(libc::EINVAL, format!("{name} is NULL")));
    }
    // SAFETY: the caller promises at least the size field.
    let size = unsafe { at.cast::<u32>().read_unaligned() } as usize;
    if !(T::FIRST..=SENSE).contains(&size) {
        let text = format!("{name}->size is {size}: set it to sizeof the struct ({} or more)", T::FIRST);
        return Err(Error::new(libc::EINVAL, text));
    }
    Ok(size)
}

/// Room for `n` entries of the caller's.
///
/// # Safety
/// `at` is NULL or points to room for `n` entries, which nobody else uses meanwhile.
pub unsafe fn room<'a, T>(at: *mut T, name: &str, n: usize) -> Result<&'a mut [MaybeUninit<T>]> {
    if n == 0 {
        return Ok(&mut []);
    }
    if at.is_null() {
        return Err(Error::new(libc::EINVAL, format!("{name} is NULL and n is {n}")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), n) })
}

/// The ids of `kuf_watch_threads`.
///
/// # Safety
/// `at` is NULL or points to `n` ids that nobody writes meanwhile.
pub unsafe fn threads<'a>(at: *const u32, n: usize) -> Result<&'a [u32]> {
    const MOST: usize = 1 << 16;
    if n == 0 {
        return Ok(&[]);
    }
    if at.is_null() || n > MOST {
        return invalid(format!("threads is NULL, or n is {n} and more than {MOST}"));
    }
    // SAFETY: the caller's promise.
    let threads = unsafe { std::slice::from_raw_parts(at, n) };
    if threads.contains(&0) {
        return invalid("threads holds 0, which is no thread id".into());
    }
    Ok(threads)
}

fn invalid<T>(text: String) -> Result<T> {
    Err(Error::new(libc::EINVAL, text))
}

fn check_flags(what: &str, flags: u64, known: u64) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => invalid(format!("{what} has unknown bits {unknown:#x}")),
    }
}

/// A field that means something only with its flag.
fn check_unused(what: &str, value: u64, flag: &str) -> Result<()> {
    match value {
        0 => Ok(()),
        _ => invalid(format!("{what} is set without {flag}")),
    }
}

fn in_range(what: &str, value: u64, default: u64, max: u64) -> Result<u64> {
    match value {
        0 => Ok(default),
        value if value <= max => Ok(value),
        value => invalid(format!("{what} is {value}: at most {max}")),
    }
}

/// A set of CPUs of `kuf_open`.
///
/// # Safety
/// `at` is NULL or points to `size` readable bytes.
pub unsafe fn cpus(at: *const c_void, size: u64, name: &str) -> Result<Option<Cpus>> {
    if at.is_null() {
        return check_unused(&format!("{name}_size"), size, name).map(|()| None);
    }
    if !(1..=Cpus::LARGEST as u64).contains(&size) {
        return invalid(format!("{name}_size is {size}: set it to sizeof the set, at most {}", Cpus::LARGEST));
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), size as usize) };
    match Cpus::from_bytes(bytes) {
        None => invalid(format!("{name} names no CPU")),
        some => Ok(some),
    }
}

/// How many userfaultfds the handle opens.
fn userfaultfds(o: &kuf_options) -> Result<usize> {
    let has = |flag| o.flags & flag != 0;
    let wanted = in_range("options->userfaultfds", o.userfaultfds.into(), 0, KUF_USERFAULTFDS_MAX.into())? as usize;
    if wanted > 0 && (has(KUF_OPEN_ADOPT_ONLY) || o.mechanism == KUF_MECHANISM_KVM_ASYNC) {
        let text = "options->userfaultfds: KUF_OPEN_ADOPT_ONLY and KUF_MECHANISM_KVM_ASYNC open none";
        return invalid(text.into());
    }
    if wanted > 1 && has(KUF_OPEN_FOLLOW_FORK) {
        return invalid("options->userfaultfds: forks are followed with one only".into());
    }
    Ok(match wanted {
        0 if has(KUF_OPEN_DIRECT | KUF_OPEN_FOLLOW_FORK) => 1,
        0 => userfaultfds_for(Cpus::of_this_thread().map_or(1, |cpus| cpus.count())),
        wanted => wanted,
    })
}

/// Options of `kuf_open`, without the sets of CPUs.
pub fn options(o: &kuf_options) -> Result<Config> {
    const KNOWN: u64 = KUF_OPEN_VM_FD
        | KUF_OPEN_USER_MODE_ONLY
        | KUF_OPEN_FOLLOW_FORK
        | KUF_OPEN_DIRECT
        | KUF_OPEN_ADOPT_ONLY
        | KUF_OPEN_KVM_DRAIN
        | KUF_OPEN_DETECT_ZERO
        | KUF_OPEN_SOURCES;
    check_flags("options->flags", o.flags, KNOWN)?;
    let has = |flag| o.flags & flag != 0;
    let mechanism = mechanism(o)?;
    if has(KUF_OPEN_DIRECT) && o.fill.is_some() {
        return invalid("KUF_OPEN_DIRECT has no thread that could call options->fill".into());
    }
    if has(KUF_OPEN_DIRECT) && has(KUF_OPEN_SOURCES) {
        return invalid("KUF_OPEN_DIRECT has no thread that could fill: it does not go with KUF_OPEN_SOURCES".into());
    }
    if has(KUF_OPEN_DIRECT) && has(KUF_OPEN_FOLLOW_FORK) {
        return invalid(
            "KUF_OPEN_FOLLOW_FORK needs a thread: with KUF_OPEN_DIRECT fork would wait for kuf_read".into(),
        );
    }
    if has(KUF_OPEN_ADOPT_ONLY) && has(KUF_OPEN_FOLLOW_FORK) {
        let text =
            "KUF_OPEN_FOLLOW_FORK is for the library's own userfaultfd: who opened the adopted one decides there";
        return invalid(text.into());
    }
    let placed = !o.cpus.is_null() || !o.populate_cpus.is_null();
    if has(KUF_OPEN_DIRECT) && placed {
        return invalid("options->cpus, populate_cpus: with KUF_OPEN_DIRECT there is no thread".into());
    }
    let run = |what, value, default| in_range(what, value, default, 64 << 20);
    Ok(Config {
        mechanism,
        fill_threads: in_range("options->fill_threads", u64::from(o.fill_threads), 2, 256)? as usize,
        demand_run: run("options->demand_run", o.demand_run, 2 << 20)?,
        populate_run: run("options->populate_run", o.populate_run, 256 << 10)?,
        populate_inflight: in_range("options->populate_inflight", o.populate_inflight, 16 << 20, u64::MAX)?,
        spin: Duration::from_micros(in_range("options->spin_us", o.spin_us.into(), 0, KUF_SPIN_MAX.into())?),
        userfaultfds: userfaultfds(o)?,
        cpus: None,
        populate_cpus: None,
        queue_max: in_range("options->queue_max", u64::from(o.queue_max), 4096, u64::MAX)? as usize,
        user_mode_only: has(KUF_OPEN_USER_MODE_ONLY),
        follow_fork: has(KUF_OPEN_FOLLOW_FORK),
        direct: has(KUF_OPEN_DIRECT),
        adopt_only: has(KUF_OPEN_ADOPT_ONLY),
        detect_zero: has(KUF_OPEN_DETECT_ZERO),
        sources: has(KUF_OPEN_SOURCES),
        host: Host {
            fill: o.fill,
            event: o.event,
            log: o.log,
            release: o.release,
            opaque: Opaque(o.opaque),
            log_level: in_range("options->log_level", u64::from(o.log_level), 0, u64::from(KUF_LOG_DEBUG))? as u32,
            opened: false.into(),
        },
    })
}

fn mechanism(o: &kuf_options) -> Result<Which> {
    let has = |flag| o.flags & flag != 0;
    let vm = if has(KUF_OPEN_VM_FD) {
        // Also where it is not used: checked as promised.
        Some(duplicate_vm(o.vm_fd)?)
    } else {
        check_unused("options->vm_fd", u64::from(o.vm_fd != 0), "KUF_OPEN_VM_FD")?;
        None
    };
    let drain = has(KUF_OPEN_KVM_DRAIN);
    if drain && o.mechanism != KUF_MECHANISM_KVM_ASYNC {
        return invalid("KUF_OPEN_KVM_DRAIN goes with KUF_MECHANISM_KVM_ASYNC".into());
    }
    match o.mechanism {
        KUF_MECHANISM_AUTO | KUF_MECHANISM_USERFAULTFD => return Ok(Which::Userfaultfd),
        KUF_MECHANISM_KVM_BITMAP | KUF_MECHANISM_KVM_ASYNC => {}
        other => return invalid(format!("options->mechanism {other} is unknown")),
    }
    let vm =
        vm.ok_or_else(|| Error::new(libc::EINVAL, "this mechanism needs the VM: KUF_OPEN_VM_FD and options->vm_fd"))?;
    for (flag, name) in [
        (KUF_OPEN_USER_MODE_ONLY, "KUF_OPEN_USER_MODE_ONLY"),
        (KUF_OPEN_FOLLOW_FORK, "KUF_OPEN_FOLLOW_FORK"),
        (KUF_OPEN_ADOPT_ONLY, "KUF_OPEN_ADOPT_ONLY"),
    ] {
        if has(flag) {
            return invalid(format!("{name} does not go with a KVM mechanism, which serves the VMM's own process"));
        }
    }
    Ok(match o.mechanism {
        KUF_MECHANISM_KVM_BITMAP => Which::KvmBitmap(vm),
        _ => Which::KvmAsync { vm, drain },
    })
}

/// A source of a slot of `len` bytes.
fn source(s: &kuf_source, len: u64) -> Result<NewSource> {
    let of_kind = |kind, known| {
        check_flags("source->flags", s.flags, known)?;
        if kind != KUF_SOURCE_FILE {
            check_unused("source->fd", u64::from(s.fd != 0), "KUF_SOURCE_FILE")?;
        }
        if kind != KUF_SOURCE_MEMORY {
            check_unused("source->addr", u64::from(!s.addr.is_null()), "KUF_SOURCE_MEMORY")?;
            check_unused("source->len", s.len, "KUF_SOURCE_MEMORY")?;
        }
        match s.reserved {
            0 => Ok(()),
            _ => invalid("source->reserved has to be 0".into()),
        }
    };
    match s.kind {
        KUF_SOURCE_FILE => {
            of_kind(s.kind, KUF_SOURCE_DIRECT_IO)?;
            Ok(NewSource::File { fd: s.fd, offset: s.offset, direct: s.flags & KUF_SOURCE_DIRECT_IO != 0 })
        }
        KUF_SOURCE_MEMORY => {
            of_kind(s.kind, 0)?;
            if s.addr.is_null() {
                return invalid("source->addr is NULL".into());
            }
            if (s.addr.addr() as u64).checked_add(s.len).is_none() {
                return invalid(format!("source->addr {:#x} + len {:#x} overflows", s.addr.addr(), s.len));
            }
            check_source_len("its memory", s.len, s.offset, len)?;
            Ok(NewSource::Memory { at: s.addr.cast::<u8>().wrapping_add(s.offset as usize) })
        }
        KUF_SOURCE_ZERO => {
            of_kind(s.kind, 0)?;
            check_unused("source->offset", s.offset, "KUF_SOURCE_FILE or KUF_SOURCE_MEMORY")?;
            Ok(NewSource::Zero)
        }
        other => invalid(format!("source->kind {other} is unknown")),
    }
}

/// A slot of `kuf_add_memory`, with its source.
pub fn memory(m: &kuf_memory, s: Option<&kuf_source>) -> Result<NewMemory> {
    const KNOWN: u32 = KUF_MEMORY_FD
        | KUF_MEMORY_UFFD
        | KUF_MEMORY_REMOTE
        | KUF_MEMORY_FILL_ALL
        | KUF_MEMORY_MEMSLOT
        | KUF_MEMORY_HUGE;
    check_flags("memory->flags", m.flags.into(), KNOWN.into())?;
    let has = |flag| m.flags & flag != 0;
    if !has(KUF_MEMORY_FD) {
        check_unused("memory->fd", u64::from(m.fd != 0), "KUF_MEMORY_FD")?;
        check_unused("memory->fd_offset", m.fd_offset, "KUF_MEMORY_FD")?;
        check_unused("KUF_MEMORY_FILL_ALL", u64::from(has(KUF_MEMORY_FILL_ALL)), "KUF_MEMORY_FD")?;
    }
    if !has(KUF_MEMORY_UFFD) {
        check_unused("memory->uffd", u64::from(m.uffd != 0), "KUF_MEMORY_UFFD")?;
        check_unused("KUF_MEMORY_REMOTE", u64::from(has(KUF_MEMORY_REMOTE)), "KUF_MEMORY_UFFD")?;
    }
    if !has(KUF_MEMORY_MEMSLOT) {
        check_unused("memory->memslot", m.memslot.into(), "KUF_MEMORY_MEMSLOT")?;
        check_unused("memory->memslot_flags", m.memslot_flags.into(), "KUF_MEMORY_MEMSLOT")?;
    }
    check_flags("memory->memslot_flags", m.memslot_flags.into(), MEMSLOT_FLAGS.into())?;
    if m.kvm_attributes & KVM_MEMORY_ATTRIBUTE_USERFAULT != 0 {
        return invalid("memory->kvm_attributes: KVM_MEMORY_ATTRIBUTE_USERFAULT is the library's to set".into());
    }
    if m.len == 0 {
        return invalid("memory->len is 0".into());
    }
    if m.hva == 0 {
        return invalid("memory->hva is 0: it has to be where the slot is mapped".into());
    }
    // Below KUF_ALL, which is no address.
    for (what, start) in [("gpa", m.gpa), ("hva", m.hva), ("fd_offset", m.fd_offset)] {
        if start.checked_add(m.len).is_none() {
            return invalid(format!("memory->{what} {start:#x} + len {:#x} overflows", m.len));
        }
    }
    Ok(NewMemory {
        gpa: m.gpa,
        len: m.len,
        hva: m.hva,
        granule: m.granule,
        file: has(KUF_MEMORY_FD).then_some((m.fd, m.fd_offset)),
        uffd: has(KUF_MEMORY_UFFD).then_some(m.uffd),
        remote: has(KUF_MEMORY_REMOTE),
        fill_all: has(KUF_MEMORY_FILL_ALL),
        huge: has(KUF_MEMORY_HUGE),
        kvm_attributes: m.kvm_attributes,
        memslot: has(KUF_MEMORY_MEMSLOT).then_some(Memslot { id: m.memslot, flags: m.memslot_flags }),
        opaque: Opaque(m.opaque),
        source: s.map(|s| source(s, m.len)).transpose()?,
    })
}

/// A request of `kuf_populate`.
pub fn populate(p: &kuf_populate) -> Result<NewPopulate> {
    check_flags("request->flags", p.flags.into(), KUF_POPULATE_STOP.into())?;
    let stop = p.flags & KUF_POPULATE_STOP != 0;
    let page = rustix::param::page_size() as u64;
    let range = match (p.gpa, p.len) {
        _ if stop => None,
        (KUF_ALL, 0) => None,
        (KUF_ALL, _) => return invalid("request->len has to be 0 with KUF_ALL".into()),
        (_, 0) => return invalid("request->len is 0".into()),
        (gpa, len) if gpa % page != 0 || len % page != 0 => {
            return invalid(format!("request->gpa and len have to be multiples of the page size {page:#x}"));
        }
        (gpa, len) if gpa.checked_add(len).is_none() => {
            return invalid(format!("request->gpa {gpa:#x} + len {len:#x} overflows"));
        }
        range => Some(range),
    };
    Ok(NewPopulate { stop, sweep: false, range, rate: p.rate })
}

/// What `kuf_resolve` was given.
pub fn resolution(src: *const c_void, flags: u32) -> Result<Resolution> {
    const KNOWN: u32 = KUF_RESOLVE_ZERO | KUF_RESOLVE_IN_PLACE | KUF_RESOLVE_POISON | KUF_RESOLVE_PRESENT;
    check_flags("flags", flags.into(), KNOWN.into())?;
    let without_src = |how| {
        if src.is_null() {
            Ok(how)
        } else {
            invalid("src has to be NULL with KUF_RESOLVE_ZERO, _IN_PLACE, _POISON and _PRESENT".into())
        }
    };
    match flags {
        0 if src.is_null() => invalid("src is NULL and no flag says what the range holds".into()),
        0 => Ok(Resolution::Data(src.cast())),
        KUF_RESOLVE_ZERO => without_src(Resolution::Zero),
        KUF_RESOLVE_IN_PLACE => without_src(Resolution::InPlace),
        KUF_RESOLVE_POISON => without_src(Resolution::Poison),
        KUF_RESOLVE_PRESENT => without_src(Resolution::Present),
        _ => invalid("flags has more than one KUF_RESOLVE_*".into()),
    }
}

/// Flags of `kuf_discard`: whether the guest gave the range back.
pub fn discard(flags: u32) -> Result<bool> {
    check_flags("flags", flags.into(), KUF_DISCARD_REMOVED.into())?;
    Ok(flags & KUF_DISCARD_REMOVED != 0)
}
