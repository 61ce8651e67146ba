//! The lean face of the triage: the component that the host runs once for every message.
//!
//! It is built for `wasm32-unknown-unknown` and imports nothing, so that an instance is made fast; the host tells it the
//! rules that the operator changed. With the feature `memory` it imports `wasi:keyvalue` and `mailroom:triage/claims`, to
//! know earlier mails. The decisions are in the crate `guest`. Models that were learned are put in when it is built, see
//! `build.rs`: as data of the component they cost an instance only what it reads of them.
//! Built for `wasm32-wasip2` it is an ordinary component, with the standard library's allocator.
#![expect(missing_docs, reason = "the generated bindings have no documentation of their own")]

#[cfg(feature = "memory")]
mod bucket;
#[cfg(all(target_family = "wasm", target_os = "unknown"))]
mod bump;

/// Models that were learned, if any.
mod models {
    include!(concat!(env!("OUT_DIR"), "/models.rs"));
}

wit_bindgen::generate!({ path: "../../wit", world: "configured-triage", generate_all });

use exports::mailroom::triage::{configured, handler};
use mailroom::triage::types::{Failure, Issue, Message, Priority, Retry, Verdict};
use std::sync::{Mutex, MutexGuard, PoisonError};

struct Triage;

/// What the operator passed.
static CONFIGURATION: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

impl configured::Guest for Triage {
    fn configure(pairs: Vec<(String, String)>) {
        *configuration() = pairs;
    }
}

fn configuration() -> MutexGuard<'static, Vec<(String, String)>> {
    CONFIGURATION.lock().unwrap_or_else(PoisonError::into_inner)
}

impl handler::Guest for Triage {
    fn triage(message: Message) -> Result<Verdict, Failure> {
        let rules = rules().map_err(retry)?;
        let verdict = decide(&message, &rules)?;
        Ok(Verdict {
            priority: match verdict.priority {
                guest::Priority::Low => Priority::Low,
                guest::Priority::Normal => Priority::Normal,
                guest::Priority::High => Priority::High,
                guest::Priority::Urgent => Priority::Urgent,
            },
            issue: match verdict.issue {
                guest::Issue::New(id) => Issue::New(id),
                guest::Issue::Existing(id) => Issue::Existing(id),
            },
            queue: verdict.queue,
            reasons: verdict.reasons,
        })
    }
}

#[cfg(feature = "memory")]
fn decide(message: &Message, rules: &guest::Rules) -> Result<guest::Verdict, Failure> {
    let mut memory = bucket::Shared::open().map_err(retry)?;
    guest::triage_with(&message.data, message.time / 1000, rules, &mut memory).map_err(|failure| match failure {
        guest::Failure::Reject(reason) => Failure::Reject(reason),
        guest::Failure::Away(reason) => retry(reason),
    })
}

#[cfg(not(feature = "memory"))]
fn decide(message: &Message, rules: &guest::Rules) -> Result<guest::Verdict, Failure> {
    guest::triage(&message.data, rules).map_err(Failure::Reject)
}

/// Not now.
fn retry(reason: String) -> Failure {
    Failure::Retry(Retry { after_ms: None, reason })
}

/// The rules as the operator wants them.
///
/// A mistake in them is not the fault of the message: the message comes again, when the mistake may be mended.
fn rules() -> Result<guest::Rules, String> {
    let pairs = std::mem::take(&mut *configuration());
    let mut rules = guest::Rules::from_config(pairs).map_err(|error| format!("configuration: {error}"))?;
    if let Some(model) = models::TEAM {
        rules = rules.with_team_model(model).map_err(|error| format!("the team model: {error}"))?;
    }
    if let Some(model) = models::PRIORITY {
        rules = rules.with_priority_model(model).map_err(|error| format!("the priority model: {error}"))?;
    }
    Ok(rules)
}

export!(Triage);
