//! An ordered table that reserves its room beforehand ([`Table::reserve`]), so that the memory for a fault exists
//! before the library claims its page. (std's BTreeMap cannot do that.)
//!
//! It is a treap: a search tree by key that is also a heap by a random priority, so it is balanced for every order of
//! insertion. The nodes are in one Vec, with a list of the free ones.

use std::ops::Range;

use crate::alloc::{refusable, NoMemory};

/// The index of no node.
const NIL: u32 = u32::MAX;

/// Free nodes that an empty table keeps.
const KEEP: usize = 64;

struct Node<T> {
    key: u64,
    priority: u32,
    /// The left child; in a free node, the next free one.
    left: u32,
    right: u32,
    /// None: the node is free.
    value: Option<T>,
}

/// Values by key.
pub struct Table<T> {
    nodes: Vec<Node<T>>,
    root: u32,
    free: u32,
    len: usize,
    random: u32,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { nodes: Vec::new(), root: NIL, free: NIL, len: 0, random: 0x9E37_79B9 }
    }
}

impl<T> Table<T> {
    /// Number of values.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many values can be inserted without memory.
    pub fn room(&self) -> usize {
        self.nodes.capacity() - self.len
    }

    /// Makes room for `more` values.
    pub fn reserve(&mut self, more: usize) -> Result<(), NoMemory> {
        let unused = self.nodes.len() - self.len;
        if self.nodes.len() + more > NIL as usize {
            return Err(NoMemory);
        }
        Ok(refusable(|| self.nodes.try_reserve(more.saturating_sub(unused)))?)
    }

    /// Inserts a value, for which the caller has made room. False: there was no room, and no memory for it.
    #[must_use]
    pub fn insert(&mut self, key: u64, value: T) -> bool {
        if self.room() == 0 && self.reserve(1).is_err() {
            return false;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        let node = Node { key, priority: self.random, left: NIL, right: NIL, value: Some(value) };
        let at = self.free;
        let at = match self.nodes.get_mut(at as usize) {
            Some(unused) => {
                self.free = unused.left;
                *unused = node;
                at
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        };
        self.root = self.insert_below(self.root, at);
        self.len += 1;
        true
    }

    /// Removes a value.
    pub fn remove(&mut self, key: u64) -> Option<T> {
        let (mut above, mut at) = (NIL, self.root);
        while at != NIL && self.key(at) != key {
            above = at;
            at = if key < self.key(at) { self.node(at).left } else { self.node(at).right };
        }
        let value = self.nodes.get_mut(at as usize)?.value.take();
        let instead = self.merge(self.node(at).left, self.node(at).right);
        match self.nodes.get_mut(above as usize) {
            None => self.root = instead,
            Some(above) if above.left == at => above.left = instead,
            Some(above) => above.right = instead,
        }
        self.node_mut(at).left = std::mem::replace(&mut self.free, at);
        self.len -= 1;
        if self.len == 0 && self.nodes.capacity() > 2 * KEEP {
            self.shrink();
        }
        value
    }

    /// The value with the greatest key up to `key`.
    pub fn floor(&self, key: u64) -> Option<(u64, &T)> {
        let at = self.last_until(key)?;
        Some((self.key(at), self.node(at).value.as_ref()?))
    }

    /// The same, to be changed.
    pub fn floor_mut(&mut self, key: u64) -> Option<(u64, &mut T)> {
        let at = self.last_until(key)?;
        Some((self.key(at), self.node_mut(at).value.as_mut()?))
    }

    /// The first of the values with keys in `range`, to be changed.
    pub fn first_mut(&mut self, range: Range<u64>) -> Option<(u64, &mut T)> {
        let at = self.first_from(range.start)?;
        let key = self.key(at);
        Some((key, self.node_mut(at).value.as_mut()?)).filter(|(key, _)| *key < range.end)
    }

    /// The values with keys in `range`, in order.
    pub fn range(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &T)> {
        let mut from = Some(range.start);
        std::iter::from_fn(move || {
            let at = self.first_from(from?)?;
            let key = self.key(at);
            from = key.checked_add(1);
            Some((key, self.node(at).value.as_ref()?)).filter(|(key, _)| *key < range.end)
        })
    }

    fn node(&self, at: u32) -> &Node<T> {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node<T> {
        &mut self.nodes[at as usize]
    }

    fn key(&self, at: u32) -> u64 {
        self.node(at).key
    }

    fn last_until(&self, key: u64) -> Option<u32> {
        let (mut found, mut at) = (NIL, self.root);
        while at != NIL {
            if self.key(at) <= key {
                found = at;
                at = self.node(at).right;
            } else {
                at = self.node(at).left;
            }
        }
        (found != NIL).then_some(found)
    }

    fn first_from(&self, key: u64) -> Option<u32> {
        let (mut found, mut at) = (NIL, self.root);
        while at != NIL {
            if self.key(at) >= key {
                found = at;
                at = self.node(at).left;
            } else {
                at = self.node(at).right;
            }
        }
        (found != NIL).then_some(found)
    }

    /// Puts the node `new` into the tree with this root. Returns the new root. The recursion is as deep as the tree: a
    /// few dozen steps.
    fn insert_below(&mut self, root: u32, new: u32) -> u32 {
        if root == NIL {
            return new;
        }
        if self.node(new).priority > self.node(root).priority {
            (self.node_mut(new).left, self.node_mut(new).right) = self.split(root, self.key(new));
            return new;
        }
        if self.key(new) < self.key(root) {
            self.node_mut(root).left = self.insert_below(self.node(root).left, new);
        } else {
            self.node_mut(root).right = self.insert_below(self.node(root).right, new);
        }
        root
    }

    /// Splits a tree into the keys below `key` and the rest.
    fn split(&mut self, root: u32, key: u64) -> (u32, u32) {
        if root == NIL {
            return (NIL, NIL);
        }
        if self.key(root) < key {
            let (below, rest) = self.split(self.node(root).right, key);
            self.node_mut(root).right = below;
            (root, rest)
        } else {
            let (below, rest) = self.split(self.node(root).left, key);
            self.node_mut(root).left = rest;
            (below, root)
        }
    }

    /// Joins two trees. All keys of the first are below those of the second.
    fn merge(&mut self, first: u32, second: u32) -> u32 {
        if first == NIL || second == NIL {
            return first.min(second);
        }
        if self.node(first).priority > self.node(second).priority {
            self.node_mut(first).right = self.merge(self.node(first).right, second);
            first
        } else {
            self.node_mut(second).left = self.merge(first, self.node(second).left);
            second
        }
    }

    /// Frees memory of an empty table.
    fn shrink(&mut self) {
        let mut fewer = Vec::new();
        if refusable(|| fewer.try_reserve_exact(KEEP)).is_ok() {
            (self.nodes, self.free, self.root) = (fewer, NIL, NIL);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn depth(table: &Table<u64>, at: u32) -> usize {
        if at == NIL {
            return 0;
        }
        1 + depth(table, table.node(at).left).max(depth(table, table.node(at).right))
    }

    #[test]
    fn the_table_agrees_with_an_ordered_map() {
        let (mut table, mut model) = (Table::default(), BTreeMap::new());
        let mut random = crate::testing::random();
        for _ in 0..20_000 {
            let (key, other) = (random(500), random(500));
            if random(2) == 0 && !model.contains_key(&key) {
                assert!(table.insert(key, key * 2));
                model.insert(key, key * 2);
            } else {
                assert_eq!(table.remove(key), model.remove(&key));
            }
            assert_eq!(table.len(), model.len());
            let floor = |key| model.range(..=key).next_back().map(|(key, value)| (*key, *value));
            assert_eq!(table.floor(other).map(|(key, value)| (key, *value)), floor(other));
            assert_eq!(table.floor_mut(other).map(|(key, value)| (key, *value)), floor(other));
            let (from, to) = (key.min(other), key.max(other));
            let expected: Vec<_> = model.range(from..to).map(|(key, value)| (*key, *value)).collect();
            assert_eq!(table.first_mut(from..to).map(|(key, value)| (key, *value)), expected.first().copied());
            assert_eq!(table.range(from..to).map(|(key, value)| (key, *value)).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn the_tree_stays_flat_in_any_order() {
        let mut table = Table::default();
        for key in 0..100_000 {
            assert!(table.insert(key, key));
        }
        assert!(depth(&table, table.root) < 64, "{}", depth(&table, table.root));
        for key in 0..100_000 {
            assert_eq!(table.remove(key), Some(key));
        }
        assert!(table.nodes.capacity() <= 2 * KEEP, "memory was given back");
    }

    #[test]
    fn a_reserved_insert_needs_no_memory() {
        let mut table = Table::default();
        table.reserve(10).expect("memory");
        assert!(table.insert(5, ()));
        table.reserve(10).expect("memory");
        let (at, room) = (table.nodes.as_ptr(), table.room());
        assert!(room >= 10);
        for key in 10..20 {
            assert!(table.insert(key, ()));
        }
        table.remove(12);
        assert!(table.insert(12, ()));
        assert_eq!((table.nodes.as_ptr(), table.room()), (at, room - 10));
        assert_eq!(table.reserve(usize::MAX / 2), Err(NoMemory));
    }
}
