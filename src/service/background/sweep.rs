//! The sweep after a lost fault: it fills every page that is not present, for a thread may wait for any of them.

use crate::abi::*;
use crate::memory::{Slot, Waiter};
use crate::pages::State;
use crate::service::background::populate;
use crate::service::config::NewPopulate;
use crate::service::fault::fill::Fill;
use crate::service::fault::{ask, demand, fill};
use crate::service::Service;
use crate::stats::all_blocked::Wait;
use crate::sync::time::Instant;
use crate::sync::{lock, Arc};
use std::ops::Range;

/// Fills every page that is not present. KVM's own pages come first, for a fault there blocks a vCPU inside KVM; the
/// rest is filled in the background.
pub fn sweep(service: &Service) {
    service.queues.end_sweep();
    let text = "KVM lost a fault of an unknown page: every closed page may be waited for and has to be filled, \
                those that KVM itself uses first";
    service.config.callbacks.event(KUF_KVM_EVENT_SWEEP, 0, 0, None, text);
    let map = service.memory.map();
    for slot in map.slots() {
        let owned = lock(&slot.kvm.owned).clone();
        owned.into_iter().for_each(|pages| demand(service, slot, pages));
    }
    for slot in map.slots().iter().filter(|slot| slot.facts().gates_kvm_only) {
        // Pages that the guest gave back are armed too, and need no source.
        let _ = demand::open_removed(service, slot, &(0..slot.pages.total()));
        // The lost fault may be that of a poisoned page: it is served when the page is discarded.
        let mut from = 0;
        while let Some(run) = slot.next_poisoned(from) {
            from = run.end;
            let mut parked = lock(&slot.kvm.parked);
            run.for_each(|page| _ = parked.entry(page).or_insert(true));
        }
    }
    if service.serviced() {
        // The call fails when there is no slot, and so no page to sweep.
        let _ = populate::populate(service, NewPopulate { stop: false, sweep: true, range: None, rate: 0 });
    }
}

/// Fills the absent pages of `pages` as if a thread waited for them.
pub fn demand(service: &Service, slot: &Arc<Slot>, pages: Range<u64>) {
    if slot.facts().gates_kvm_only {
        let _ = demand::open_removed(service, slot, &pages);
    }
    let mut from = pages.start;
    while let Some(run) = slot.pages.first_run(from..pages.end, State::Absent, 1) {
        from = run.end;
        let page = run.start;
        if !service.serviced() {
            ask::ask(service, slot, page, Waiter { page, wait: Wait::unknown(Instant::now()), flags: 0, fork: None });
            continue;
        }
        let terms = slot.fill_terms(true);
        let claims = slot.claims_for(&run, true).ok();
        let claimed = claims.and_then(|mut claims| claims.claim(&slot.pages, page, 1, State::Absent, terms));
        if let Some((id, pages)) = claimed {
            // A failure has poisoned the page and has been reported to the caller.
            let _ = fill::fill(service, &Fill::demand(slot, id, pages, page, 0));
        }
    }
}
