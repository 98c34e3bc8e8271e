//! Questions to Linux about this process.

pub mod cpus;
pub mod descriptor;
pub mod environment;
pub mod maps;
pub mod proc;
pub mod resident;
pub mod usercopy;
pub mod worker;
