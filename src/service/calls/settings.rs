//! `kuf_settings`: the settings in effect.

use crate::abi::*;
use crate::error::Result;
use crate::memory::Slot;
use crate::service::config::{Config, Which};
use crate::service::{no_slot, Service};

/// `kuf_settings`.
pub fn settings(service: &Service, gpa: u64) -> Result<kuf_settings_info> {
    if gpa == KUF_ALL {
        return Ok(of_handle(service));
    }
    let map = service.memory.map();
    let slot = map.at_gpa(gpa).ok_or_else(|| no_slot(gpa))?;
    Ok(of_slot(service, slot))
}

fn of_handle(service: &Service) -> kuf_settings_info {
    let config = &service.config;
    // The options for fills have no effect where the caller reads faults itself.
    let filling = |value| if config.serviced { value } else { 0 };
    let spins = service.threads.may_spin();
    kuf_settings_info {
        size: 0,
        mechanism: mechanism(config),
        open_flags: open_flags(config),
        flags: 0,
        fill_threads: filling(config.fill_threads as u64) as u32,
        userfaultfds: match (&service.own, &config.mechanism) {
            (None, _) | (_, Which::KvmAsync { .. }) => 0,
            _ => config.userfaultfds as u32,
        },
        spin_us: if spins { config.spin.as_micros() as u32 } else { 0 },
        log_level: config.callbacks.level(),
        demand_run: filling(config.demand_run),
        populate_run: filling(config.populate_run),
        page_size: rustix::param::page_size() as u64,
    }
}

fn of_slot(service: &Service, slot: &Slot) -> kuf_settings_info {
    let handle = of_handle(service);
    let whole_pages = |run| match run {
        0 => 0,
        run => (run / slot.granule).max(1) * slot.granule,
    };
    let adopted = slot.facts().adopted;
    let flags = [
        (slot.in_place(), KUF_SETTING_IN_PLACE),
        (slot.huge.wanted, KUF_SETTING_HUGE),
        (adopted, KUF_SETTING_ADOPTED),
        (slot.facts().remote, KUF_SETTING_REMOTE),
    ];
    kuf_settings_info {
        mechanism: if adopted { KUF_MECHANISM_USERFAULTFD } else { handle.mechanism },
        flags: flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag),
        userfaultfds: if adopted { 1 } else { handle.userfaultfds },
        demand_run: whole_pages(handle.demand_run),
        populate_run: whole_pages(handle.populate_run),
        page_size: slot.granule,
        ..handle
    }
}

fn mechanism(config: &Config) -> u32 {
    match config.mechanism {
        Which::Userfaultfd => KUF_MECHANISM_USERFAULTFD,
        Which::KvmBitmap(_) => KUF_MECHANISM_KVM_BITMAP,
        Which::KvmAsync { .. } => KUF_MECHANISM_KVM_ASYNC,
    }
}

fn open_flags(config: &Config) -> u32 {
    let caller_driven = !config.serviced && !config.direct;
    let drain = matches!(config.mechanism, Which::KvmAsync { drain: true, .. });
    [
        (caller_driven, KUF_OPEN_CALLER_DRIVEN),
        (config.user_mode_only, KUF_OPEN_USER_MODE_ONLY),
        (config.follow_fork, KUF_OPEN_FOLLOW_FORK),
        (config.direct, KUF_OPEN_DIRECT),
        (config.adopt_only, KUF_OPEN_ADOPT_ONLY),
        (config.detect_zero, KUF_OPEN_DETECT_ZERO),
        (config.serviced && config.callbacks.fill.is_none(), KUF_OPEN_SOURCES),
        (config.callbacks.to_stderr, KUF_OPEN_DEBUG_ENV),
        (drain, KUF_KVM_OPEN_DRAIN),
    ]
    .iter()
    .filter(|(set, _)| *set)
    .fold(0, |all, (_, flag)| all | flag)
}
