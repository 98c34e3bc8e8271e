//! Behaviour that a real kernel does not show on demand: a userfaultfd that refuses, a KVM that loses faults, a library
//! that fails inside. The name of each file of tests is its behaviour. The tests share:
//!
//! - `rig`: the set-up, the caller's callbacks, and memory
//! - `calls`: the calls of the C interface
//! - `faulty`, `fake_kvm`: the test doubles

mod calls;
mod fake_kvm;
mod faulty;
mod rig;

mod close;
mod end_in_storm;
mod given_back;
mod kvm_pages;
mod kvm_queue;
mod overtaken;
mod poison;
mod queue;
mod replay_window;
mod resolve;
mod shortage;
mod slot_ends;
