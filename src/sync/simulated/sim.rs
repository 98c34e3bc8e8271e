//! The scheduler and the clock of the simulation.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;

use shuttle::scheduler::{Schedule, Scheduler, Task as ShuttleTask, TaskId};

/// Nanoseconds that pass at each point.
const STEP_NS: u64 = 25;

/// Steps that a task takes at most while others are ready, where priorities decide.
const LONGEST: u64 = 5000;

/// After this many steps priorities are drawn anew, for two tasks that run for ever in turn would keep the others from
/// running.
const ANEW: u64 = 10_000;

/// Numbers that follow from a seed.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next number (splitmix64).
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in `n` times; never if `n` is 0.
    pub fn once_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
}

/// How the next task is chosen.
#[derive(Clone, Debug)]
pub enum Policy {
    /// Any ready task runs; the running one changes at a draw, once in `change` points.
    Walk { change: u64 },
    /// The task with the highest priority runs. Priorities are random, and the running task's becomes the lowest at
    /// each of these steps (probabilistic concurrency testing).
    Priorities { changes: Vec<u64> },
}

/// The parameters of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub policy: Policy,
    /// Time jumps at a point, once in so many; 0: never, time goes on by steps and when all tasks are blocked.
    pub jump: u64,
    /// A thread that waits for a notification wakes without one, once in so many points; 0: never.
    pub spurious: u64,
    /// A run that takes more steps than this counts as one that does not end.
    pub most_steps: u64,
}

#[derive(Default)]
struct Task {
    name: String,
    /// The name of the lock or event it is blocked on; None: it is ready.
    blocked: Option<&'static str>,
    deadline: Option<u64>,
    /// It may wake without a notification.
    spurious: bool,
    priority: u64,
    locals: BTreeMap<usize, Box<dyn Any>>,
    /// The number of its last step.
    ran: u64,
}

struct World {
    plan: Plan,
    random: Random,
    running: bool,
    current: usize,
    tasks: Vec<Task>,
    now: u64,
    steps: u64,
    lowest: u64,
    /// Steps that the running task has taken.
    streak: u64,
    /// A hash of every choice made, to compare two runs of one seed.
    hash: u64,
    on_failure: Option<fn(&str) -> !>,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World {
        plan: Plan { seed: 0, policy: Policy::Walk { change: 4 }, jump: 0, spurious: 0, most_steps: u64::MAX },
        random: Random::new(0),
        running: false,
        current: 0,
        tasks: Vec::new(),
        now: 0,
        steps: 0,
        lowest: 0,
        streak: 0,
        hash: 0,
        on_failure: None,
    });
}

fn with<T>(act: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with(|world| act(&mut world.borrow_mut()))
}

/// The outcome of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub steps: u64,
    pub now: u64,
    pub hash: u64,
}

/// Runs `body` as the first task, under `plan`. A failure calls `on_failure`.
pub fn run(plan: Plan, on_failure: fn(&str) -> !, body: impl Fn() + Send + Sync + 'static) -> Outcome {
    with(|world| {
        world.random = Random::new(plan.seed);
        world.plan = plan;
        world.running = true;
        world.current = 0;
        world.tasks = vec![Task { name: "main".to_owned(), ..Task::default() }];
        (world.now, world.steps, world.lowest, world.hash) = (1_000_000_000, 0, u64::MAX / 2, 0);
        world.on_failure = Some(on_failure);
        world.tasks[0].priority = world.random.next() >> 2;
    });
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.max_steps = shuttle::MaxSteps::None;
    config.silence_warnings = true;
    shuttle::Runner::new(Chooser { begun: false }, config).run(body);
    with(|world| {
        world.running = false;
        world.tasks.clear();
        Outcome { steps: world.steps, now: world.now, hash: world.hash }
    })
}

/// Ends the run with a failure.
pub fn fail(what: &str) -> ! {
    let (report, on_failure) = with(|world| (world.report(what), world.on_failure));
    match on_failure {
        Some(on_failure) => on_failure(&report),
        None => panic!("{report}"),
    }
}

/// Whether a run is in progress.
pub fn running() -> bool {
    WORLD.with(|world| world.try_borrow().is_ok_and(|world| world.running))
}

/// A point where another task may run.
pub fn point() {
    if running() {
        shuttle::thread::sleep(std::time::Duration::ZERO);
    }
}

/// The running task.
pub fn current() -> usize {
    with(|world| world.current)
}

/// The running task's name.
pub fn name() -> String {
    with(|world| world.tasks.get(world.current).map_or_else(String::new, |task| task.name.clone()))
}

/// Nanoseconds since the beginning of time.
pub fn now() -> u64 {
    with(|world| world.now)
}

/// Steps since the run began.
pub fn steps() -> u64 {
    with(|world| world.steps)
}

/// Moves the clock.
pub fn pass(ns: u64) {
    with(|world| world.now += ns);
}

/// A number that follows from the seed and from all that has happened so far.
pub fn draw(below: u64) -> u64 {
    with(|world| world.random.below(below))
}

/// Blocks the running task until [`ready`] is called for it or, if there is one, until `deadline`. `spurious`: it may
/// also return without either.
pub fn block(what: &'static str, deadline: Option<u64>, spurious: bool) {
    assert!(running(), "blocked on {what} outside a run");
    with(|world| {
        let me = world.current;
        let task = &mut world.tasks[me];
        (task.blocked, task.deadline, task.spurious) = (Some(what), deadline, spurious);
    });
    shuttle::thread::sleep(std::time::Duration::ZERO);
}

/// Makes a blocked task ready.
pub fn ready(task: usize) {
    with(|world| {
        if let Some(task) = world.tasks.get_mut(task) {
            (task.blocked, task.deadline) = (None, None);
        }
    });
}

/// Names the running task, which has just started.
pub(super) fn call_it(name: String) {
    with(|world| {
        let me = world.current;
        world.tasks[me].name = name;
    });
}

/// The running task's value for a key, made by `init` if there is none.
pub(super) fn local(key: usize, init: &dyn Fn() -> Box<dyn Any>) -> *const dyn Any {
    let found = |world: &mut World| {
        let me = world.current;
        if world.tasks.len() <= me {
            world.tasks.resize_with(me + 1, Task::default);
        }
        world.tasks[me].locals.get(&key).map(|value| std::ptr::from_ref::<dyn Any>(&**value))
    };
    if let Some(value) = with(found) {
        return value;
    }
    let value = init();
    with(|world| {
        let me = world.current;
        std::ptr::from_ref::<dyn Any>(&**world.tasks[me].locals.entry(key).or_insert(value))
    })
}

impl World {
    fn report(&self, what: &str) -> String {
        use std::fmt::Write;
        let mut text = format!("{what}\n  in {:?}, after {} steps\n", self.task_name(self.current), self.steps);
        for (n, task) in self.tasks.iter().enumerate() {
            if task.blocked.is_none() && task.ran + LONGEST * 20 > self.steps {
                let _ = writeln!(text, "  {n:3} {:16} running, last {} steps ago", task.name, self.steps - task.ran);
            }
            if let Some(blocked) = task.blocked {
                let until = task
                    .deadline
                    .map_or_else(String::new, |at| format!(", for {} us at most", at.saturating_sub(self.now) / 1000));
                let _ = writeln!(text, "  {n:3} {:16} blocked: {blocked}{until}", task.name);
            }
        }
        text
    }

    fn task_name(&self, task: usize) -> &str {
        self.tasks.get(task).map_or("", |task| &task.name)
    }

    /// Chooses the next of the tasks that have not ended.
    fn choose(&mut self, alive: &[usize]) -> Result<usize, String> {
        self.steps += 1;
        self.now += STEP_NS;
        while alive.iter().any(|n| *n >= self.tasks.len()) {
            let priority = self.random.next() >> 2;
            self.tasks.push(Task { priority, ..Task::default() });
        }
        if self.steps > self.plan.most_steps {
            return Err(format!("no end after {} steps", self.steps));
        }
        if self.random.once_in(self.plan.jump) {
            let most = 1000 << self.random.below(14);
            self.now += self.random.below(most);
        }
        if self.random.once_in(self.plan.spurious) {
            let waiting: Vec<_> = alive.iter().copied().filter(|n| self.may_wake(*n)).collect();
            if !waiting.is_empty() {
                let n = waiting[self.random.below(waiting.len() as u64) as usize];
                (self.tasks[n].blocked, self.tasks[n].deadline) = (None, None);
            }
        }
        loop {
            for n in alive {
                let task = &mut self.tasks[*n];
                if task.deadline.is_some_and(|at| at <= self.now) {
                    (task.blocked, task.deadline) = (None, None);
                }
            }
            let candidates: Vec<_> = alive.iter().copied().filter(|n| self.tasks[*n].blocked.is_none()).collect();
            if !candidates.is_empty() {
                return Ok(self.pick(&candidates));
            }
            match alive.iter().filter_map(|n| self.tasks[*n].deadline).min() {
                Some(at) => self.now = at,
                None => return Err("every thread is blocked, and nothing will wake one".to_owned()),
            }
        }
    }

    fn may_wake(&self, n: usize) -> bool {
        self.tasks[n].blocked.is_some() && self.tasks[n].spurious
    }

    fn pick(&mut self, candidates: &[usize]) -> usize {
        let here = candidates.contains(&self.current);
        if self.steps % ANEW == 0 {
            for task in &mut self.tasks {
                task.priority = self.random.next() >> 2;
            }
        }
        match &self.plan.policy {
            Policy::Walk { change } => {
                let change = *change;
                if here && !self.random.once_in(change) {
                    return self.current;
                }
                candidates[self.random.below(candidates.len() as u64) as usize]
            }
            Policy::Priorities { changes } => {
                self.streak = if here { self.streak + 1 } else { 0 };
                if self.streak > LONGEST || changes.binary_search(&self.steps).is_ok() {
                    self.streak = 0;
                    self.lowest -= 1;
                    let lowest = self.lowest >> 2;
                    self.tasks[self.current].priority = lowest;
                }
                // The first task of those with the highest priority.
                let best = candidates.iter().copied().max_by_key(|n| (self.tasks[*n].priority, usize::MAX - n));
                best.unwrap_or(self.current)
            }
        }
    }
}

/// The scheduler as shuttle calls it.
struct Chooser {
    begun: bool,
}

impl Scheduler for Chooser {
    fn new_execution(&mut self) -> Option<Schedule> {
        let first = !std::mem::replace(&mut self.begun, true);
        first.then(|| Schedule::new(0))
    }

    fn next_task(&mut self, runnable: &[&ShuttleTask], _: Option<TaskId>, _: bool) -> Option<TaskId> {
        let alive: Vec<usize> = runnable.iter().map(|task| task.id().into()).collect();
        let chosen = with(|world| {
            let chosen = world.choose(&alive)?;
            world.current = chosen;
            world.tasks[chosen].ran = world.steps;
            world.hash = (world.hash ^ chosen as u64).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
            Ok::<_, String>(chosen)
        });
        match chosen {
            Ok(chosen) => runnable.iter().map(|task| task.id()).find(|id| usize::from(*id) == chosen),
            Err(what) => fail(&what),
        }
    }

    fn next_u64(&mut self) -> u64 {
        0
    }
}
