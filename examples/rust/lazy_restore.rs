// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores a guest's memory from an image while the guest runs: `cargo run --features vm-memory --example lazy_restore`.
//!
//! The guest is two threads here, which check each page that they touch against the image. A VMM would run its vCPUs on the
//! same memory.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;

use kuf::{probe, End, Errno, EventKind, Feature, Filled, Kuf, LogLevel, Memory, Options, Run};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const PAGE: u64 = 4096;
/// Guest physical ranges: below 3 GiB, and above the hole under 4 GiB.
const RANGES: [(GuestAddress, usize); 2] = [(GuestAddress(0), 48 << 20), (GuestAddress(4 << 30), 16 << 20)];

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("kuf-lazy-restore-{}.img", std::process::id()));
    write_image(&File::create_new(&path)?)?;
    let (image, check) = (File::open(&path)?, File::open(&path)?);
    std::fs::remove_file(&path)?;

    let guest = GuestMemoryMmap::<()>::from_ranges(&RANGES)?;

    // The tag of a slot says where it begins in the image.
    let options = Options::serviced(move |run: &mut Run<'_>| {
        let offset = run.tag() as u64 + run.memory_offset();
        Filled::from(image.read_exact_at(run.buf(), offset))
    });
    let options = options
        .on_event(|event| match event.kind() {
            EventKind::Complete | EventKind::Populated => println!("{}", event.text()),
            _ => eprintln!("{:?}: {}", event.kind(), event.text()),
        })
        .on_log(LogLevel::Warn, |level, text| eprintln!("{level:?}: {text}"));
    // KVM's accesses take a privilege; those of the threads below do not.
    let options = if probe(None)?.has(Feature::KernelFaults) { options } else { options.user_mode_only() };
    let kuf = Kuf::open(options)?;

    let mut offset = 0;
    for region in guest.iter() {
        kuf.add_memory(Memory::region(region).tag(offset as usize))?;
        offset += region.len();
    }

    // The guest starts at once. Populate fills the pages that it does not touch.
    kuf.populate_all(0)?;
    let pages = thread::scope(|scope| {
        let vcpus = [3, 7].map(|stride| {
            let (guest, check) = (&guest, &check);
            scope.spawn(move || run_guest(guest, check, stride).map_err(|error| error.to_string()))
        });
        vcpus.map(|vcpu| vcpu.join().unwrap_or_else(|_| Err("it panicked".into()))).into_iter().sum::<Result<u64, _>>()
    })?;

    let stats = kuf.stats()?;
    println!("{pages} pages touched and right; {} faults, {} MiB copied", stats.faults, stats.bytes_copied >> 20);
    match kuf.close(End::Complete) {
        Err(error) if error.errno() == Errno::BUSY => kuf.close(End::Populate)?,
        result => result?,
    }
    Ok(())
}

/// Touches one page in `stride`, and checks it. Returns how many.
fn run_guest(guest: &GuestMemoryMmap, image: &File, stride: u64) -> Result<u64, Box<dyn Error>> {
    let (mut touched, mut start) = (0, 0);
    for region in guest.iter() {
        for offset in (0..region.len()).step_by((stride * PAGE) as usize) {
            let (mut there, mut right) = ([0; PAGE as usize], [0; PAGE as usize]);
            guest.read_slice(&mut there, GuestAddress(region.start_addr().0 + offset))?;
            image.read_exact_at(&mut right, start + offset)?;
            if there != right {
                return Err(format!("wrong bytes at {:#x} of the image", start + offset).into());
            }
            touched += 1;
        }
        start += region.len();
    }
    Ok(touched)
}

fn write_image(image: &File) -> std::io::Result<()> {
    let pages = RANGES.iter().map(|(_, len)| *len as u64).sum::<u64>() / PAGE;
    (0..pages).try_for_each(|page| image.write_all_at(&(page + 1).to_le_bytes().repeat(PAGE as usize / 8), page * PAGE))
}
