//! A simulation of the whole library: the real code, behind its C functions, over a simulated kernel, under a schedule
//! that a seed decides. The same seed repeats a run exactly.
//!
//!     tests/check/simulate.sh                 a fixed set of seeds
//!     make simulate SECONDS=60                new seeds for so long
//!     KUF_SIM_SEED=n KUF_SIM_TRACE=1 ...      one seed again, with what happened in it
//!
//! Built with `--cfg shuttle --cfg rustix_no_linux_raw`; without, there is nothing here.

#[cfg(shuttle)]
mod caller;
#[cfg(shuttle)]
mod guest;
#[cfg(shuttle)]
mod kernel;
#[cfg(shuttle)]
mod model;
#[cfg(shuttle)]
mod run;
#[cfg(shuttle)]
mod setup;
#[cfg(shuttle)]
mod state;
#[cfg(shuttle)]
mod sys;

fn main() {
    #[cfg(shuttle)]
    run::main();
}
