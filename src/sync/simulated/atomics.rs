//! Atomics: each access is a point where another task may run, except a relaxed read-modify-write, which only counts.

use std::sync::atomic::Ordering;

use super::sim::point;

/// As in `std`.
pub fn fence(_: Ordering) {
    point();
}

fn at(order: Ordering) {
    if order != Ordering::Relaxed {
        point();
    }
}

macro_rules! common {
    ($name:ident, $value:ty $(, $generic:ident)?) => {
        impl$(<$generic>)? $name$(<$generic>)? {
            pub const fn new(value: $value) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            pub fn load(&self, order: Ordering) -> $value {
                point();
                self.0.load(order)
            }

            pub fn store(&self, value: $value, order: Ordering) {
                point();
                self.0.store(value, order);
            }

            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                at(order);
                self.0.swap(value, order)
            }

            pub fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                good: Ordering,
                bad: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange(old, new, good, bad)
            }

            pub fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                good: Ordering,
                bad: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(old, new, good, bad)
            }

            pub fn fetch_update(
                &self,
                good: Ordering,
                bad: Ordering,
                next: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                point();
                self.0.fetch_update(good, bad, next)
            }

            pub fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            pub fn into_inner(self) -> $value {
                self.0.into_inner()
            }
        }

        impl$(<$generic>)? From<$value> for $name$(<$generic>)? {
            fn from(value: $value) -> Self {
                Self::new(value)
            }
        }

        impl$(<$generic>)? std::fmt::Debug for $name$(<$generic>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! fetch {
    ($name:ident, $value:ty: $($method:ident)*) => {
        impl $name {
            $(pub fn $method(&self, value: $value, order: Ordering) -> $value {
                at(order);
                self.0.$method(value, order)
            })*
        }
    };
}

macro_rules! integers {
    ($($name:ident: $value:ty),*) => {
        $(
            #[derive(Default)]
            pub struct $name(std::sync::atomic::$name);
            common!($name, $value);
            fetch!($name, $value: fetch_add fetch_sub fetch_or fetch_and fetch_xor fetch_max fetch_min);
        )*
    };
}

integers!(AtomicU8: u8, AtomicU32: u32, AtomicI32: i32, AtomicU64: u64, AtomicI64: i64, AtomicUsize: usize);

#[derive(Default)]
pub struct AtomicBool(std::sync::atomic::AtomicBool);
common!(AtomicBool, bool);
fetch!(AtomicBool, bool: fetch_or fetch_and fetch_xor);

pub struct AtomicPtr<T>(std::sync::atomic::AtomicPtr<T>);
common!(AtomicPtr, *mut T, T);
