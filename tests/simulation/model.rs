//! The words that a page may hold: a shadow of guest memory that does not depend on the library.
//!
//! A page's bytes are one word, written over all of the page. During concurrent changes several words are right; the
//! first read decides which.

/// A change of a page in progress: from its beginning its word is right too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub id: u64,
    pub word: u64,
    /// The value of `Right::changes` at its beginning.
    since: u64,
    /// It began before the page was added.
    inherited: bool,
}

#[derive(Clone, Debug)]
pub struct Right {
    /// Right words.
    pub words: Vec<u64>,
    /// Calls and events in progress.
    pub under_way: Vec<Change>,
    /// Whether a touch may raise SIGBUS: the source has failed, or the page was poisoned.
    pub may_fail: bool,
    /// Counts writes and drops.
    pub version: u64,
    /// Counts beginnings and ends of changes.
    changes: u64,
    /// The changes that ended while others were in progress, each with its time: any of those others may count as the
    /// earlier one.
    ended: Vec<(u64, u64)>,
}

/// The record of a change in progress.
#[derive(Clone, Debug)]
pub struct Begun {
    pub id: u64,
    version: u64,
    changes: u64,
    before: Vec<u64>,
    alone: bool,
}

impl Right {
    pub fn new(word: u64) -> Self {
        Self { words: vec![word], under_way: Vec::new(), may_fail: false, version: 0, changes: 0, ended: Vec::new() }
    }

    fn set(&mut self, word: u64) {
        self.words.clear();
        self.add(word);
        for n in 0..self.under_way.len() {
            self.add(self.under_way[n].word);
        }
    }

    fn add(&mut self, word: u64) {
        if !self.words.contains(&word) {
            self.words.push(word);
        }
    }

    /// Begins a change after which the page holds `word`.
    pub fn begin(&mut self, id: u64, word: u64) -> Begun {
        self.changes += 1;
        let changes = self.changes;
        let begun =
            Begun { id, version: self.version, changes, before: self.words.clone(), alone: self.under_way.is_empty() };
        self.under_way.push(Change { id, word, since: changes, inherited: false });
        self.add(word);
        begun
    }

    /// As [`Right::begin`], for a change that began before the page was added.
    pub fn inherit(&mut self, id: u64, word: u64) {
        self.changes += 1;
        self.under_way.push(Change { id, word, since: self.changes, inherited: true });
        self.add(word);
    }

    /// As [`Right::end`], for an inherited change, which may have happened here or not.
    pub fn end_inherited(&mut self, id: u64) {
        let Some(at) = self.under_way.iter().position(|change| change.id == id && change.inherited) else { return };
        let word = self.under_way.remove(at).word;
        self.has_ended(word);
    }

    fn has_ended(&mut self, word: u64) {
        self.changes += 1;
        let oldest = self.under_way.iter().map(|change| change.since).min();
        self.ended.retain(|(when, _)| oldest.is_some_and(|oldest| *when > oldest));
        if oldest.is_some() {
            self.ended.push((self.changes, word));
        }
    }

    /// Ends a change: it has happened, or may have (`done` is None), or has changed nothing.
    pub fn end(&mut self, begun: &Begun, done: Option<bool>) {
        let mine = |change: &Change| change.id == begun.id && !change.inherited;
        let Some(at) = self.under_way.iter().position(mine) else { return };
        let change = self.under_way.remove(at);
        // A concurrent change may have come before or after this one.
        let same = self.version == begun.version && begun.alone && self.changes == begun.changes;
        match done {
            Some(false) => self.changes += 1,
            _ => self.has_ended(change.word),
        }
        match done {
            Some(true) if same => self.set(change.word),
            Some(false) if same => self.words.clone_from(&begun.before),
            _ => {}
        }
    }

    /// The guest wrote `word`.
    pub fn written(&mut self, word: u64) {
        self.version += 1;
        self.ended.clear();
        self.set(word);
    }

    /// The guest's own madvise has dropped the page. A discard that ended since that call began may count as the later
    /// one.
    pub fn dropped(&mut self) {
        self.version += 1;
        self.set(0);
        for n in 0..self.ended.len() {
            self.add(self.ended[n].1);
        }
    }

    /// Whether a read may return `word`; if so, the page holds it from now on.
    pub fn read(&mut self, word: u64) -> bool {
        let right = self.words.contains(&word);
        if right {
            self.set(word);
        }
        right
    }
}
