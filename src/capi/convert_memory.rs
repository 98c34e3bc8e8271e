//! Memory slots and their sources, from the structs of `kuf.h`.

use super::convert::*;
use crate::abi::*;
use crate::api::checks::invalid;
use crate::api::memory::Memory;
use crate::api::source::{Source, SourceKind, MOST_LAYERS};
use crate::caller::Opaque;
use crate::error::{words, Result};
use crate::mechanism::bitmap::Memslot;
use crate::service::config::NewMemory;

/// One layer of a source.
///
/// # Safety
/// `bitmap` is NULL or points to `bitmap_size` readable bytes, which no thread changes during the call.
unsafe fn layer(s: &kuf_source) -> Result<Source<'static>> {
    let of_kind = |kind, known| -> Result<()> {
        check_flags("source->flags", s.flags, known)?;
        if kind != KUF_SOURCE_FILE {
            check_unused("source->fd", u64::from(descriptor("source->fd", s.fd)?.is_some()), "KUF_SOURCE_FILE")?;
        }
        if kind != KUF_SOURCE_MEMORY {
            check_unused("source->addr", u64::from(!s.addr.is_null()), "KUF_SOURCE_MEMORY")?;
            check_unused("source->len", s.len, "KUF_SOURCE_MEMORY")?;
        }
        Ok(())
    };
    let kind = match s.kind {
        KUF_SOURCE_FILE => {
            of_kind(s.kind, KUF_SOURCE_DIRECT_IO)?;
            Ok(SourceKind::File { fd: s.fd, offset: s.offset, direct: s.flags & KUF_SOURCE_DIRECT_IO != 0 })
        }
        KUF_SOURCE_MEMORY => {
            of_kind(s.kind, 0)?;
            if s.addr.is_null() {
                return invalid("source->addr is NULL");
            }
            Ok(SourceKind::Memory { addr: s.addr.cast(), len: s.len, offset: s.offset, keep: None })
        }
        KUF_SOURCE_ZERO => {
            of_kind(s.kind, 0)?;
            check_unused("source->offset", s.offset, "KUF_SOURCE_FILE or KUF_SOURCE_MEMORY")?;
            Ok(SourceKind::Zero)
        }
        other => invalid(words!("source->kind {other} is unknown")),
    }?;
    let source = match (s.slot_offset, s.slot_len) {
        (0, 0) => Source::of(kind),
        (start, len) => Source::of(kind).part_of(start, len),
    };
    if s.bitmap.is_null() {
        check_unused("source->bitmap_size", s.bitmap_size, "source->bitmap")?;
        check_unused("source->bitmap_page_size", s.bitmap_page_size, "source->bitmap")?;
        return Ok(source);
    }
    // SAFETY: the caller promises bitmap_size readable bytes, which no thread changes during the call.
    let bits = unsafe { std::slice::from_raw_parts(s.bitmap.cast::<u8>(), s.bitmap_size as usize) };
    source.bitmap(bits, s.bitmap_page_size)
}

/// The source of a slot with its layers. None: NULL.
///
/// # Safety
/// `at` is NULL or points to a struct of `size` readable bytes, whose pointers are as the header says; so does its `base`.
pub unsafe fn sources(mut at: *const kuf_source) -> Result<Option<Source<'static>>> {
    let mut whole: Option<Source> = None;
    for _ in 0..MOST_LAYERS {
        if at.is_null() {
            return Ok(whole);
        }
        let name = if whole.is_none() { "source" } else { "source->base" };
        // SAFETY: the caller's promise.
        let source = unsafe { read_struct(at, name) }?;
        at = source.base;
        // SAFETY: the caller's promise.
        let layer = unsafe { layer(&source) }?;
        whole = Some(match whole {
            None => layer,
            Some(above) => above.over(layer),
        });
    }
    match at.is_null() {
        true => Ok(whole),
        false => invalid(words!("source->base: more than {MOST_LAYERS} layers")),
    }
}

/// The KVM fields of a slot: memory attributes, and the memslot that the library sets.
fn for_kvm(k: &kuf_kvm_memory) -> Result<(u64, Option<Memslot>)> {
    check_flags("kvm->flags", k.flags, KUF_KVM_MEMORY_MEMSLOT)?;
    let is_set = k.flags & KUF_KVM_MEMORY_MEMSLOT != 0;
    if !is_set {
        check_unused("kvm->memslot", k.memslot.into(), "KUF_KVM_MEMORY_MEMSLOT")?;
        check_unused("kvm->memslot_flags", k.memslot_flags.into(), "KUF_KVM_MEMORY_MEMSLOT")?;
    }
    Ok((k.attributes, is_set.then_some(Memslot { id: k.memslot, flags: k.memslot_flags })))
}

/// A slot of `kuf_add_memory`, with its source and its KVM fields.
pub fn memory(
    m: &kuf_memory,
    source: Option<Source<'static>>,
    kvm: Option<&kuf_kvm_memory>,
) -> Result<Memory<'static>> {
    const KNOWN: u32 = KUF_MEMORY_REMOTE | KUF_MEMORY_FILL_ALL | KUF_MEMORY_HUGE | KUF_MEMORY_POPULATED;
    check_flags("memory->flags", m.flags, KNOWN)?;
    let has = |flag| m.flags & flag != 0;
    let (fd, uffd) = (descriptor("memory->fd", m.fd)?, descriptor("memory->uffd", m.uffd)?);
    if fd.is_none() {
        check_unused("memory->fd_offset", m.fd_offset, "memory->fd")?;
        check_unused("KUF_MEMORY_FILL_ALL", u64::from(has(KUF_MEMORY_FILL_ALL)), "memory->fd")?;
    }
    if uffd.is_none() {
        check_unused("KUF_MEMORY_REMOTE", u64::from(has(KUF_MEMORY_REMOTE)), "memory->uffd")?;
    }
    let (kvm_attributes, memslot) = kvm.map_or(Ok((0, None)), for_kvm)?;
    let new = Memory::at(m.gpa, m.len, m.hva).new;
    let new = NewMemory {
        granule: m.page_size,
        file: fd.map(|fd| (fd, m.fd_offset)),
        uffd,
        remote: has(KUF_MEMORY_REMOTE),
        fill_all: has(KUF_MEMORY_FILL_ALL),
        populated: has(KUF_MEMORY_POPULATED),
        huge: has(KUF_MEMORY_HUGE),
        kvm_attributes,
        memslot,
        opaque: Opaque(m.opaque),
        ..new
    };
    Ok(Memory { new, source })
}
