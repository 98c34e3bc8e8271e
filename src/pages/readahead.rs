//! Readahead policy: which pages a fault fills besides its own. They follow it where access is sequential, and surround
//! it where access is dense. The guess comes from the faults of one slot and the states of its pages.
//!
//! **Sequential.** A fault that goes on where the pages filled for an earlier fault end makes a stream of the two. Each
//! further fault of the stream doubles the number of pages filled, up to a limit. A thread that goes through memory
//! then faults only at the ends of windows. A stream is found by the page where it goes on. So several streams can go
//! on side by side, one thread can have two (a copy does), and a stream can move from vCPU to vCPU. Random access
//! creates only beginnings: streams of one page. These are replaced first, and a thread that has many replaces its own.
//!
//! **Dense.** Where a quarter of the pages around have been asked for, the guest will touch most of the rest. A working
//! set of a tenth of memory, spread by chance, is that dense in one place of a hundred, so dense fills make it two to
//! five percent larger.

use std::ops::Range;

use crate::pages::{Pages, State};

/// In bytes: the longest run that a guess may add to a fault's own wait, and the window that is filled where access is
/// dense.
pub const NEAR: u64 = 64 << 10;

/// A place is dense if at least this many of the pages counted by [`Pages::asked_around`] are present or being filled.
const DENSE: u32 = 8;

/// How many pages that were present already a stream may skip beyond its window.
const SKIP: u64 = 64;

/// The number of streams that a slot keeps.
const STREAMS: usize = 16;

/// The number of beginnings of streams that one thread may have.
const BEGINNINGS: usize = 4;

/// How far a slot's faults may reach, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Pages filled at once, while the faulting thread waits.
    pub near: u64,
    /// Pages filled in all.
    pub far: u64,
    /// Pages of the window that is filled where access is dense; 0: none.
    window: u64,
}

impl Reach {
    /// `most`: bytes that one fault may fill.
    pub fn new(most: u64, granule: u64) -> Self {
        // With pages so large that few make a window, their number says nothing about density.
        let window = if most >= NEAR && NEAR / granule >= 4 { NEAR / granule } else { 0 };
        Self { near: (most.min(NEAR) / granule).max(1), far: (most / granule).max(1), window }
    }

    /// The window around `page` that is filled where access is dense.
    fn window(self, pages: &Pages, page: u64) -> Option<Range<u64>> {
        let start = page - page.checked_rem(self.window)?;
        Some(start..pages.total().min(start + self.window))
    }
}

/// The pages that a fault fills.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Absent pages to fill at once, the faulting page among them.
    pub run: Range<u64>,
    /// Pages to fill afterwards, if they are absent, while the faulting thread runs.
    pub rest: Rest,
    /// The pages that the stream has gone through since its last fault without another fault.
    pub passed: Range<u64>,
}

/// Pages that no thread has asked for yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rest {
    Nothing,
    /// The pages that a stream comes to next.
    Sequential(Range<u64>),
    /// The missing pages of a dense place, most of which will be wanted.
    Dense(Range<u64>),
}

#[derive(Clone, Copy, Default)]
struct Stream {
    /// The first page of the run filled, or to be filled, for the last fault of the stream,
    from: u64,
    /// and the page after the last: where it goes on.
    next: u64,
    /// The planned length of that run; 1: a beginning; 0: no stream.
    len: u64,
    /// The faulting thread, or 0.
    thread: u32,
    /// The clock of its last fault.
    used: u64,
}

impl Stream {
    /// Whether a fault at `page` continues the stream upwards.
    fn goes_on(&self, pages: &Pages, page: u64) -> bool {
        let (begun, within) = (self.len > 1, self.from < page && page < self.next);
        let skips = |to: u64| to - self.next <= SKIP && pages.first_run(self.next..to, State::Absent, 1).is_none();
        // `within`: the thread is faster than the fills ahead of it.
        self.len > 0 && (page == self.next || begun && (within || page > self.next && skips(page)))
    }

    /// The same downwards.
    fn goes_back(&self, page: u64) -> bool {
        self.len > 0 && page + 1 == self.from
    }
}

/// The streams of one slot.
#[derive(Default)]
pub struct Streams {
    known: [Stream; STREAMS],
    clock: u64,
}

impl Streams {
    /// Plans the fills for a fault of `thread` (0: unknown) at `page`, which is absent.
    pub fn plan(&mut self, pages: &Pages, reach: Reach, page: u64, thread: u32) -> Plan {
        let alone = Plan { run: page..page + 1, rest: Rest::Nothing, passed: page..page };
        if reach.far == 1 {
            return alone;
        }
        self.clock += 1;
        let used = self.clock;
        if let Some(stream) = self.known.iter_mut().find(|stream| stream.goes_on(pages, page)) {
            let len = (stream.len * 2).min(reach.far);
            let passed = if stream.len > 1 { stream.from..page } else { page..page };
            let end = pages.total().min(page + len);
            *stream = Stream { from: page, next: end, len, thread, used };
            let run =
                pages.first_run(page..end.min(page + reach.near), State::Absent, u64::MAX).unwrap_or(page..page + 1);
            let rest = if len > reach.near && run.end < end { Rest::Sequential(run.end..end) } else { Rest::Nothing };
            return Plan { run, rest, passed };
        }
        if let Some(stream) = self.known.iter_mut().find(|stream| stream.goes_back(page)) {
            let len = (stream.len * 2).min(reach.near);
            let run = absent_before(pages, (page + 1).saturating_sub(len), page);
            *stream = Stream { from: run.start, next: page + 1, len, thread, used };
            return Plan { run, ..alone };
        }
        match reach.window(pages, page) {
            // +1: the faulting page itself.
            Some(window) if pages.asked_around(page) + 1 >= DENSE => {
                let run = pages.alike_around(page, &window);
                // All of the window may be present soon, so the stream goes on at its end.
                *self.room(thread) = Stream { from: window.start, next: window.end, len: 1, thread, used };
                let rest = if run == window { Rest::Nothing } else { Rest::Dense(window) };
                return Plan { run, rest, ..alone };
            }
            _ => {}
        }
        *self.room(thread) = Stream { from: page, next: page + 1, len: 1, thread, used };
        alone
    }

    /// A fill ahead that ends at `end` failed: a stream that goes on there begins anew.
    pub fn broken(&mut self, end: u64) {
        self.known.iter_mut().filter(|stream| stream.next == end).for_each(|stream| stream.len = 1);
    }

    /// The stream that a new beginning replaces: one of the thread's own if it has many, else the least useful one.
    fn room(&mut self, thread: u32) -> &mut Stream {
        let own = |stream: &Stream| thread != 0 && stream.len == 1 && stream.thread == thread;
        let many = self.known.iter().filter(|stream| own(stream)).count() >= BEGINNINGS;
        let rank = |stream: &&mut Stream| (many && !own(stream), stream.len > 1, stream.used);
        let [first, others @ ..] = &mut self.known;
        others.iter_mut().chain([first]).min_by_key(rank).expect("there are some")
    }
}

/// The absent pages that end with `page`, from `first` on at most.
fn absent_before(pages: &Pages, first: u64, page: u64) -> Range<u64> {
    let start = (first..page).rev().find(|page| pages.get(*page) != State::Absent).map_or(first, |page| page + 1);
    start..page + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANULE: u64 = 4096;

    /// A slot whose pages are present as soon as they are asked for.
    struct Guest {
        pages: Pages,
        streams: Streams,
        reach: Reach,
        faults: u64,
        asked: u64,
        passed: u64,
    }

    impl Guest {
        fn new(len: u64, most: u64) -> Self {
            let (pages, reach) = (Pages::new(len).expect("memory"), Reach::new(most, GRANULE));
            Self { pages, streams: Streams::default(), reach, faults: 0, asked: 0, passed: 0 }
        }

        /// Touches `page`. Returns the fault's plan, or None if the page is present.
        fn touch(&mut self, page: u64, thread: u32) -> Option<Plan> {
            if self.pages.get(page) != State::Absent {
                return None;
            }
            let plan = self.streams.plan(&self.pages, self.reach, page, thread);
            let run = plan.run.clone();
            assert!(run.contains(&page) && run.end - run.start <= self.reach.near);
            let moved = self.pages.transition(run.clone(), State::Absent, State::Present);
            assert_eq!(moved, run.end - run.start, "all of it was absent");
            let rest = match plan.rest.clone() {
                Rest::Nothing => 0..0,
                Rest::Sequential(rest) | Rest::Dense(rest) => rest,
            };
            assert!(rest.end <= self.pages.total() && rest.end.saturating_sub(page) <= self.reach.far);
            self.faults += 1;
            self.asked += moved + self.pages.transition(rest, State::Absent, State::Present);
            self.passed += plan.passed.end - plan.passed.start;
            Some(plan)
        }
    }

    #[test]
    fn a_fault_without_a_guess_fills_one_page() {
        let mut guest = Guest::new(1000, GRANULE);
        (0..1000).for_each(|page| assert_eq!(guest.touch(page, 1).unwrap().rest, Rest::Nothing));
        assert_eq!(guest.faults, 1000);
        assert_eq!(Reach::new(2 << 20, 2 << 20), Reach { near: 1, far: 1, window: 0 });
        assert_eq!(Reach::new(1 << 20, 64 << 10), Reach { near: 1, far: 16, window: 0 });
    }

    #[test]
    fn a_stream_doubles_up_to_the_limit() {
        let mut guest = Guest::new(100_000, 2 << 20);
        let windows: Vec<u64> = (0..5000).filter(|page| guest.touch(*page, 0).is_some()).collect();
        assert_eq!(windows, [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 1535, 2047, 2559, 3071, 3583, 4095, 4607]);
        assert_eq!(guest.passed, 4606, "all that was gone through between the first and the last fault");
        let plan = guest.touch(5119, 0).unwrap();
        assert_eq!((plan.run, plan.rest), (5119..5135, Rest::Sequential(5135..5631)));
    }

    #[test]
    fn streams_go_on_side_by_side_despite_noise() {
        let mut guest = Guest::new(1 << 20, 2 << 20);
        let mut random = crate::testing::random();
        let (mut of_streams, mut of_noise) = (0, 0);
        for step in 0..20_000 {
            for stream in 0..4 {
                of_streams += u64::from(guest.touch(stream * 50_000 + step, stream as u32 % 2 + 1).is_some());
            }
            if step % 100 == 0 {
                (0..20).for_each(|_| of_noise += u64::from(guest.touch((1 << 19) + random(1 << 19), 9).is_some()));
            }
        }
        assert!(of_streams < 4 * 20_000 / 100, "{of_streams} faults of streams");
        assert!(of_noise > 3900, "{of_noise} of what is in no order");
    }

    #[test]
    fn a_stream_skips_present_pages_and_meets_pages_that_were_not_filled() {
        let mut guest = Guest::new(10_000, 2 << 20);
        (0..10_000).step_by(3).for_each(|page| {
            guest.pages.transition(page..page + 1, State::Absent, State::Present);
        });
        (0..10_000).for_each(|page| {
            guest.touch(page, 0);
        });
        assert!(guest.faults < 60, "{} faults", guest.faults);
        let mut guest = Guest::new(10_000, 2 << 20);
        (0..100).for_each(|page| {
            guest.touch(page, 0);
        });
        // The thread is faster than the fills ahead: it faults in the middle of them.
        guest.pages.transition(110..127, State::Present, State::Absent);
        assert_eq!(guest.touch(110, 0).unwrap().rest, Rest::Sequential(126..110 + 128));
        // Faults of the same page again and again, dropped in between, make no stream.
        for _ in 0..20 {
            guest.pages.transition(5000..5001, State::Present, State::Absent);
            assert_eq!(guest.touch(5000, 0).unwrap().run, 5000..5001);
        }
    }

    #[test]
    fn a_stream_goes_downwards_too() {
        let mut guest = Guest::new(10_000, 2 << 20);
        (0..10_000).rev().for_each(|page| {
            guest.touch(page, 0);
        });
        assert!(guest.faults <= 10_000 / 16 + 6 && guest.asked == 10_000, "{} faults", guest.faults);
    }

    #[test]
    fn a_failed_fill_ends_a_stream() {
        let mut guest = Guest::new(10_000, 2 << 20);
        (0..511).for_each(|page| {
            guest.touch(page, 0);
        });
        guest.streams.broken(511);
        assert_eq!(guest.touch(511, 0).unwrap().run, 511..513);
    }

    #[test]
    fn a_dense_place_is_filled_up() {
        let mut guest = Guest::new(64, 2 << 20);
        let alone = |page| assert_eq!(guest.touch(page, 0).unwrap().run, page..page + 1);
        [0, 5, 9, 14, 18, 24, 29].into_iter().for_each(alone);
        let plan = guest.touch(20, 0).unwrap();
        assert_eq!((plan.run, plan.rest), (19..24, Rest::Dense(16..32)));
        assert_eq!(guest.touch(3, 0).unwrap().run, 1..5);
        assert_eq!(guest.touch(40, 0).unwrap().run, 40..41, "the next 32 are another place");
    }

    /// Touches `percent` of the pages in random order. Returns faults and filled pages, each per touched page.
    fn scattered(percent: u64) -> (f64, f64) {
        let mut guest = Guest::new(1 << 17, 2 << 20);
        let mut random = crate::testing::random();
        let mut order: Vec<u64> = (0..1 << 17).collect();
        (1..order.len()).rev().for_each(|n| order.swap(n, random(n as u64 + 1) as usize));
        order.truncate(order.len() * percent as usize / 100);
        order.iter().for_each(|page| {
            guest.touch(*page, 1 + (page % 8) as u32);
        });
        let touched = order.len() as f64;
        (guest.faults as f64 / touched, guest.asked as f64 / touched)
    }

    #[test]
    fn a_scattered_working_set_grows_little_and_a_whole_one_has_few_faults() {
        let (_, five) = scattered(5);
        let (_, tenth) = scattered(10);
        let (faults, all) = scattered(100);
        assert!(five < 1.01, "{five}");
        assert!(tenth < 1.08, "{tenth}");
        assert!(faults < 0.32 && all == 1.0, "{faults}, {all}");
    }
}
