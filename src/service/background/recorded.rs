//! Maps a recorded working set to pages of the present slots.

use crate::memory::Map;
use crate::record_file::Recording;
use crate::service::background::replay_window::{self, Part, WindowPace};
use crate::service::background::{skip_removed, Act, Step};
use crate::service::Service;
use crate::sync::time::Instant;
use crate::sync::Arc;

/// A window of this many runs and bytes of a recording is sorted by address, so that neighbours are filled at once:
/// vCPUs that each went through memory in order are recorded page by page in turn. The window is small, so that pages
/// wanted first stay in front.
const WINDOW_RUNS: usize = 64;

const WINDOW_BYTES: u64 = 4 << 20;

/// The parts of `recording` in slots of `map`, in whole pages, window by window, each window in the order of addresses.
pub fn windows<'a>(recording: &'a Recording, map: &'a Map) -> impl Iterator<Item = Vec<Part>> + 'a {
    let mut runs = recording.runs().peekable();
    std::iter::from_fn(move || {
        runs.peek()?;
        let (mut n, mut bytes) = (0, 0_u64);
        let mut window: Vec<Part> = Vec::with_capacity(WINDOW_RUNS);
        // A run longer than a window is a window of its own.
        let fits = |n, bytes: u64| n == 0 || n < WINDOW_RUNS && bytes <= WINDOW_BYTES;
        while let Some(run) = runs.next_if(|run| fits(n, bytes.saturating_add(run.end - run.start))) {
            n += 1;
            bytes = bytes.saturating_add(run.end - run.start);
            window.extend(map.within_gpa(run).map(|(slot, offsets)| Part {
                slot: slot.clone(),
                pages: slot.pages_of(&offsets),
                rank: n,
            }));
        }
        window.sort_unstable_by_key(|part| (part.slot.gpa, part.pages.start));
        window.dedup_by(|part, last| {
            let joins = Arc::ptr_eq(&part.slot, &last.slot) && part.pages.start <= last.pages.end;
            if joins {
                last.pages.end = last.pages.end.max(part.pages.end);
                last.rank = last.rank.min(part.rank);
            }
            joins
        });
        Some(window)
    })
}

/// Calls `act` with the parts of `recording` in slots of `map`, in whole pages, about in the order of the recording.
pub fn each_part(recording: &Recording, map: &Map, go_on: &dyn Fn() -> Step, act: &mut Act<'_>) -> Step {
    for window in windows(recording, map) {
        go_on()?;
        window.iter().try_for_each(|part| skip_removed(&part.slot, go_on, act(&part.slot, &part.pages)))?;
    }
    Ok(())
}

/// As [`each_part`], for parts that `act` fills. While windows are quick, faults in a window are left to the replay.
pub fn each_window(
    service: &Service,
    recording: &Recording,
    map: &Map,
    go_on: &dyn Fn() -> Step,
    act: &mut Act<'_>,
) -> Step {
    let mut pace = WindowPace::default();
    let mut windows = windows(recording, map);
    let mut next = windows.next().map(|parts| replay_window::window(service, parts, &pace));
    while let Some(mut window) = next {
        go_on()?;
        // Open the next window before this one ends, for a thread that leaves this one faults in the next.
        next = windows.next().map(|parts| replay_window::window(service, parts, &pace));
        let began = Instant::now();
        while let Some(part) = window.next() {
            skip_removed(&part.slot, go_on, act(&part.slot, &part.pages))?;
        }
        pace.took(&window, began.elapsed());
    }
    Ok(())
}
