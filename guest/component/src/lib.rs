//! The lean face of the triage: the component that the host runs once for every message.
//!
//! It is built for `wasm32-unknown-unknown`, so that nothing of WASI is imported that it does not use: its only
//! import is `wasi:config/store`, for the rules that the operator changed. The decisions are in the crate `guest`.
//! Built for `wasm32-wasip2` it is an ordinary component, with the standard library's allocator.
#![expect(missing_docs, reason = "the generated bindings have no documentation of their own")]

#[cfg(all(target_family = "wasm", target_os = "unknown"))]
mod bump;

wit_bindgen::generate!({ path: "../../wit", world: "triage", generate_all });

use exports::mailroom::triage::handler;
use mailroom::triage::types::{Failure, Issue, Message, Priority, Retry, Verdict};
use wasi::config::store;

struct Triage;

impl handler::Guest for Triage {
    fn triage(message: Message) -> Result<Verdict, Failure> {
        let rules = rules().map_err(|reason| Failure::Retry(Retry { after_ms: None, reason }))?;
        let verdict = guest::triage(&message.data, &rules).map_err(Failure::Reject)?;
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

/// The rules as the operator wants them.
///
/// A mistake in them is not the fault of the message: the message comes again, when the mistake may be mended.
fn rules() -> Result<guest::Rules, String> {
    let pairs = store::get_all().map_err(|error| match error {
        store::Error::Upstream(error) | store::Error::Io(error) => format!("configuration: {error}"),
    })?;
    guest::Rules::from_config(pairs).map_err(|error| format!("configuration: {error}"))
}

export!(Triage);
