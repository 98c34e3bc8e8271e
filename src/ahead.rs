//! Which pages a fault brings besides its own: those that follow where access is sequential, those around where it is
//! dense. A guess, made of the faults of one slot and the states of its pages; whoever makes the fills asks it.
//!
//! **Sequential.** A fault that goes on where the pages brought for an earlier one end makes a stream of the two. Each
//! one after that doubles what is brought, up to a limit. A toucher that goes through memory has faults only at the
//! ends of windows then. Streams are known by where they go on, so several go on side by side, also one thread's (a
//! copy has two), and one that moves from vCPU to vCPU. Who faults here and there leaves nothing but beginnings that
//! come to nothing: they give way to one another first, and those of one thread do so among themselves.
//!
//! **Dense.** Where a quarter of the pages around have been asked for, most of the rest will be. A working set
//! of a tenth of memory, spread by chance, comes to that in one place of a hundred, and grows by two to five percent.

use std::ops::Range;

use crate::pages::{Pages, State};

/// The longest run that somebody waits for because of a guess, and what is filled up where access is dense, in bytes.
pub const NEAR: u64 = 64 << 10;

/// Of the pages that [`Pages::asked_around`] looks at, so many make a place dense.
const DENSE: u32 = 8;

/// How far a stream may go on beyond its window, over pages that were there.
const SKIP: u64 = 64;

/// How many streams are known.
const STREAMS: usize = 16;

/// How many beginnings of streams one thread may have.
const BEGINNINGS: usize = 4;

/// How far a slot's faults may reach, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// With somebody waiting.
    pub near: u64,
    /// In all.
    pub far: u64,
    /// What is filled up where access is dense; 0: nothing.
    window: u64,
}

impl Reach {
    /// `most`: bytes that one fault may bring.
    pub fn new(most: u64, granule: u64) -> Self {
        // Of pages so large that few make a window, a few say nothing.
        let window = if most >= NEAR && NEAR / granule >= 4 { NEAR / granule } else { 0 };
        Self { near: (most.min(NEAR) / granule).max(1), far: (most / granule).max(1), window }
    }

    /// The pages around `page` that are filled up where access is dense.
    fn window(self, pages: &Pages, page: u64) -> Option<Range<u64>> {
        let start = page - page.checked_rem(self.window)?;
        Some(start..pages.total().min(start + self.window))
    }
}

/// What a fault brings.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// At once: absent pages, the one that is waited for among them.
    pub run: Range<u64>,
    /// Afterwards, with nobody waiting: what is absent of these.
    pub rest: Rest,
    /// What a stream has gone through since its last fault, without another.
    pub passed: Range<u64>,
}

/// Pages that nobody has asked for yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rest {
    Nothing,
    /// Those that a stream comes to next.
    Sequential(Range<u64>),
    /// Those that are missing in a place where most will be wanted.
    Dense(Range<u64>),
}

#[derive(Clone, Copy, Default)]
struct Stream {
    /// The first page of what was brought, or is to be, for the last fault of it,
    from: u64,
    /// and the page after the last: where it goes on.
    next: u64,
    /// How many pages those were meant to be; 1: a beginning. 0: no stream.
    len: u64,
    /// The toucher's thread, or 0.
    thread: u32,
    /// When it last went on.
    used: u64,
}

impl Stream {
    /// Whether a fault at `page` goes on with it, upwards.
    fn goes_on(&self, pages: &Pages, page: u64) -> bool {
        let (begun, within) = (self.len > 1, self.from < page && page < self.next);
        let skips = |to: u64| to - self.next <= SKIP && pages.first_run(self.next..to, State::Absent, 1).is_none();
        // Within: faster than what is brought ahead of it.
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
    /// What a fault of `thread` (0: unknown) at `page`, which is absent, brings.
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
            // It counts itself.
            Some(window) if pages.asked_around(page) + 1 >= DENSE => {
                let run = pages.alike_around(page, &window);
                // All of it may be there soon.
                *self.room(thread) = Stream { from: window.start, next: window.end, len: 1, thread, used };
                let rest = if run == window { Rest::Nothing } else { Rest::Dense(window) };
                return Plan { run, rest, ..alone };
            }
            _ => {}
        }
        *self.room(thread) = Stream { from: page, next: page + 1, len: 1, thread, used };
        alone
    }

    /// The source had nothing for pages before `end`: who goes on there begins anew.
    pub fn broken(&mut self, end: u64) {
        self.known.iter_mut().filter(|stream| stream.next == end).for_each(|stream| stream.len = 1);
    }

    /// Where a beginning is written down: over one of the thread's own if it has many, else over what is of least use.
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

    /// A slot whose pages are there as soon as they are asked for.
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
            let (pages, reach) = (Pages::new(len), Reach::new(most, GRANULE));
            Self { pages, streams: Streams::default(), reach, faults: 0, asked: 0, passed: 0 }
        }

        /// What the fault brings, unless there is none.
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
    fn one_page_where_nothing_is_to_be_guessed() {
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
    fn streams_side_by_side_and_noise_between() {
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
    fn a_stream_goes_on_over_pages_that_were_there_and_over_what_was_not_brought() {
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
        // Faster than what is brought: the fault comes in the midst of it.
        guest.pages.transition(110..127, State::Present, State::Absent);
        assert_eq!(guest.touch(110, 0).unwrap().rest, Rest::Sequential(126..110 + 128));
        // The same page again and again, dropped in between, is no stream.
        for _ in 0..20 {
            guest.pages.transition(5000..5001, State::Present, State::Absent);
            assert_eq!(guest.touch(5000, 0).unwrap().run, 5000..5001);
        }
    }

    #[test]
    fn downwards_too() {
        let mut guest = Guest::new(10_000, 2 << 20);
        (0..10_000).rev().for_each(|page| {
            guest.touch(page, 0);
        });
        assert!(guest.faults <= 10_000 / 16 + 6 && guest.asked == 10_000, "{} faults", guest.faults);
    }

    #[test]
    fn what_fails_ends_a_stream() {
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

    /// Every page touched in an order of chance, of `percent` of the pages: faults and pages brought, by page touched.
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
