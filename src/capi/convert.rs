//! Converts the C structs to the library's own types, and back.

use std::ffi::c_void;
use std::mem::{size_of, MaybeUninit};

use rustix::io::Errno;

use crate::abi::*;
use crate::api::checks::{in_range, invalid, populate_range};
use crate::api::options::{Mode, Options};
use crate::caller::{OnEvent, OnLog};
use crate::capi::callbacks::CCallbacks;
use crate::error::{words, Error, Result};
use crate::os::cpus::Cpus;
use crate::os::descriptor::duplicate_vm;
use crate::service::config::{NewPopulate, Resolution, Which};
use crate::sync::Arc;

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
    kuf_options: 112,
    kuf_memory: 80,
    kuf_source: 88,
    kuf_kvm_memory: 24,
    kuf_populate_request: 32,
    kuf_probe_info: 2096,
    kuf_progress_info: 72,
    kuf_settings_info: 56,
    kuf_stats_info: 1608,
}

const _: () = assert!(size_of::<kuf_fault>() == 64);

/// Upper bound for a plausible struct size.
const SENSE: usize = 1 << 16;

/// Reads a struct of the version that the caller was compiled with.
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
        if let Some(at) = tail.iter().position(|byte| *byte != 0) {
            let at = known + at;
            let text =
                words!("{name} at offset {at} is not 0, but this version of the library knows {known} bytes of it");
            return Err(Error::new(Errno::TOOBIG, text));
        }
        Ok(value.assume_init())
    }
}

/// Fills a struct of the version that the caller was compiled with. `make` takes the size to store in it.
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
        return Err(Error::new(Errno::INVAL, words!("{name} is NULL")));
    }
    // SAFETY: the caller promises at least the size field.
    let size = unsafe { at.cast::<u32>().read_unaligned() } as usize;
    if !(T::FIRST..=SENSE).contains(&size) {
        let text = words!("{name}->size is {size}: set it to sizeof the struct ({} or more)", T::FIRST);
        return Err(Error::new(Errno::INVAL, text));
    }
    Ok(size)
}

/// The caller's room for `n` entries.
///
/// # Safety
/// `at` is NULL or points to room for `n` entries, which no other thread uses meanwhile.
pub unsafe fn room<'a, T>(at: *mut T, name: &str, n: usize) -> Result<&'a mut [MaybeUninit<T>]> {
    if n == 0 {
        return Ok(&mut []);
    }
    if at.is_null() {
        return Err(Error::new(Errno::INVAL, words!("{name} is NULL and n is {n}")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), n) })
}

/// The ids of `kuf_watch_threads`.
///
/// # Safety
/// `at` is NULL or points to `n` ids that no thread writes meanwhile.
pub unsafe fn threads<'a>(at: *const u32, n: usize) -> Result<&'a [u32]> {
    const MOST: usize = 1 << 16;
    if n == 0 {
        return Ok(&[]);
    }
    if at.is_null() || n > MOST {
        return invalid(words!("threads is NULL, or n is {n} and more than {MOST}"));
    }
    // SAFETY: the caller's promise.
    let threads = unsafe { std::slice::from_raw_parts(at, n) };
    if threads.contains(&0) {
        return invalid("threads holds 0, which is no thread id");
    }
    Ok(threads)
}

pub fn check_flags(what: &str, flags: u32, known: u32) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => invalid(words!("{what} has unknown bits {unknown:#x}")),
    }
}

/// Checks that a field is 0 without its flag.
pub fn check_unused(what: &str, value: u64, flag: &str) -> Result<()> {
    match value {
        0 => Ok(()),
        _ => invalid(words!("{what} is set without {flag}")),
    }
}

/// A set of CPUs of `kuf_open`.
///
/// # Safety
/// `at` is NULL or points to `size` readable bytes.
pub unsafe fn cpus(at: *const c_void, size: u64, name: &str) -> Result<Option<Cpus>> {
    if at.is_null() {
        return check_unused(&words!("{name}_size"), size, name).map(|()| None);
    }
    if !(1..=Cpus::LARGEST as u64).contains(&size) {
        return invalid(words!("{name}_size is {size}: set it to sizeof the set, at most {}", Cpus::LARGEST));
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), size as usize) };
    match Cpus::from_bytes(bytes) {
        None => invalid(words!("{name} names no CPU")),
        some => Ok(some),
    }
}

/// A descriptor of a struct: 0 and -1 stand for none.
pub fn descriptor(what: &str, fd: i32) -> Result<Option<i32>> {
    match fd {
        0 | -1 => Ok(None),
        fd if fd > 0 => Ok(Some(fd)),
        fd => Err(Error::new(Errno::BADF, words!("{what} is {fd}: 0 and -1 stand for none"))),
    }
}

/// Options of `kuf_open` for this handle, without the set of CPUs, and the callbacks in them.
pub fn options(o: &kuf_options, handle: *mut kuf_handle) -> Result<(Options, Arc<CCallbacks>)> {
    const KNOWN: u32 = KUF_OPEN_CALLER_DRIVEN
        | KUF_OPEN_USER_MODE_ONLY
        | KUF_OPEN_FOLLOW_FORK
        | KUF_OPEN_DIRECT
        | KUF_OPEN_ADOPT_ONLY
        | KUF_KVM_OPEN_DRAIN
        | KUF_OPEN_DETECT_ZERO
        | KUF_OPEN_SOURCES
        | KUF_OPEN_DEBUG_ENV;
    check_flags("options->flags", o.flags, KNOWN)?;
    if o.reserved != 0 {
        return Err(Error::new(
            Errno::TOOBIG,
            "options->reserved is not 0: this version of the library does not know it",
        ));
    }
    let has = |flag| o.flags & flag != 0;
    let mechanism = mechanism(o)?;
    let callbacks = Arc::new(CCallbacks::new(o, handle));
    let options = Options {
        event: o.event.map(|_| -> OnEvent {
            let callbacks = callbacks.clone();
            Box::new(move |event| callbacks.event(event))
        }),
        log: o.log.map(|_| -> OnLog {
            let callbacks = callbacks.clone();
            Box::new(move |level, text| callbacks.log(level, text))
        }),
        log_level: in_range("options->log_level", o.log_level.into(), KUF_LOG_WARN.into(), KUF_LOG_DEBUG.into())?
            as u32,
        mechanism,
        fill_threads: o.fill_threads.into(),
        demand_run: o.demand_run,
        populate_run: o.populate_run,
        spin_us: o.spin_us.into(),
        userfaultfds: o.userfaultfds.into(),
        end_timeout_ms: o.end_timeout_ms.into(),
        user_mode_only: has(KUF_OPEN_USER_MODE_ONLY),
        follow_fork: has(KUF_OPEN_FOLLOW_FORK),
        adopt_only: has(KUF_OPEN_ADOPT_ONLY),
        detect_zero: has(KUF_OPEN_DETECT_ZERO),
        debug_env: has(KUF_OPEN_DEBUG_ENV),
        ..Options::new(mode(o, &callbacks)?)
    };
    Ok((options, callbacks))
}

/// The mode, of which the caller must have set exactly one.
fn mode(o: &kuf_options, callbacks: &Arc<CCallbacks>) -> Result<Mode> {
    let flag = |flag, name, mode| (o.flags & flag != 0).then_some((name, mode));
    let said = [
        o.fill.map(|_| ("options->fill", Mode::Serviced(callbacks.clone()))),
        flag(KUF_OPEN_CALLER_DRIVEN, "KUF_OPEN_CALLER_DRIVEN", Mode::CallerDriven),
        flag(KUF_OPEN_DIRECT, "KUF_OPEN_DIRECT", Mode::Direct),
        flag(KUF_OPEN_SOURCES, "KUF_OPEN_SOURCES", Mode::Sources),
    ];
    let mut modes = said.into_iter().flatten();
    match (modes.next(), modes.next()) {
        (Some((_, mode)), None) => Ok(mode),
        (Some((one, _)), Some((other, _))) => {
            invalid(words!("{one} and {other} contradict each other: a handle has one mode"))
        }
        (None, _) => invalid(
            "no mode: set options->fill, or one of KUF_OPEN_SOURCES, KUF_OPEN_CALLER_DRIVEN and KUF_OPEN_DIRECT",
        ),
    }
}

fn mechanism(o: &kuf_options) -> Result<Which> {
    let has = |flag| o.flags & flag != 0;
    // The header promises this check even where the VM is not used.
    let vm = descriptor("options->vm_fd", o.vm_fd)?.map(duplicate_vm).transpose()?;
    let drain = has(KUF_KVM_OPEN_DRAIN);
    if drain && o.mechanism != KUF_MECHANISM_KVM_ASYNC {
        return invalid("KUF_KVM_OPEN_DRAIN goes with KUF_MECHANISM_KVM_ASYNC");
    }
    match o.mechanism {
        KUF_MECHANISM_AUTO | KUF_MECHANISM_USERFAULTFD => return Ok(Which::Userfaultfd),
        KUF_MECHANISM_KVM_BITMAP | KUF_MECHANISM_KVM_ASYNC => {}
        other => return invalid(words!("options->mechanism {other} is unknown")),
    }
    let vm = vm.ok_or_else(|| Error::new(Errno::INVAL, "this mechanism needs the VM: options->vm_fd"))?;
    for (flag, name) in [
        (KUF_OPEN_USER_MODE_ONLY, "KUF_OPEN_USER_MODE_ONLY"),
        (KUF_OPEN_FOLLOW_FORK, "KUF_OPEN_FOLLOW_FORK"),
        (KUF_OPEN_ADOPT_ONLY, "KUF_OPEN_ADOPT_ONLY"),
    ] {
        if has(flag) {
            return invalid(words!("{name} does not go with a KVM mechanism, which serves the VMM's own process"));
        }
    }
    Ok(match o.mechanism {
        KUF_MECHANISM_KVM_BITMAP => Which::KvmBitmap(vm),
        _ => Which::KvmAsync { vm, drain },
    })
}

/// A request of `kuf_populate`.
pub fn populate(p: &kuf_populate_request) -> Result<NewPopulate> {
    check_flags("request->flags", p.flags, KUF_POPULATE_STOP)?;
    let stop = p.flags & KUF_POPULATE_STOP != 0;
    let range = match (p.gpa, p.len) {
        _ if stop => None,
        (KUF_ALL, _) => None,
        (gpa, len) => Some(populate_range(gpa, len)?),
    };
    Ok(NewPopulate { stop, sweep: false, range, rate: p.rate })
}

/// The arguments of `kuf_resolve`.
pub fn resolution(src: *const c_void, flags: u32) -> Result<Resolution> {
    const KNOWN: u32 = KUF_RESOLVE_ZERO | KUF_RESOLVE_IN_PLACE | KUF_RESOLVE_POISON | KUF_RESOLVE_PRESENT;
    check_flags("flags", flags, KNOWN)?;
    let without_src = |how| {
        if src.is_null() {
            Ok(how)
        } else {
            invalid("src has to be NULL with KUF_RESOLVE_ZERO, _IN_PLACE, _POISON and _PRESENT")
        }
    };
    match flags {
        0 if src.is_null() => invalid("src is NULL and no flag says what the range holds"),
        0 => Ok(Resolution::Data(src.cast())),
        KUF_RESOLVE_ZERO => without_src(Resolution::Zero),
        KUF_RESOLVE_IN_PLACE => without_src(Resolution::InPlace),
        KUF_RESOLVE_POISON => without_src(Resolution::Poison),
        KUF_RESOLVE_PRESENT => without_src(Resolution::Present),
        _ => invalid("flags has more than one KUF_RESOLVE_*"),
    }
}

/// Flags of `kuf_discard`. Returns whether the guest gave the range back.
pub fn discard(flags: u32) -> Result<bool> {
    check_flags("flags", flags, KUF_DISCARD_REFILL | KUF_DISCARD_ZERO)?;
    match flags {
        KUF_DISCARD_REFILL => Ok(false),
        KUF_DISCARD_ZERO => Ok(true),
        _ => invalid("flags: set one of KUF_DISCARD_REFILL and KUF_DISCARD_ZERO"),
    }
}
