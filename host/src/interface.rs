//! The words that host and guest share, bound from `wit/`, and the verdict's form on the wire.

use serde::Serialize;

mod bindings {
    #![allow(missing_docs, clippy::all, reason = "generated from wit/, which carries the documentation")]

    wasmtime::component::bindgen!({
        path: "../wit",
        world: "triage",
        imports: {
            "wasi:keyvalue": async,
            "mailroom:triage/claims": async,
        },
        exports: { default: async },
        with: { "wasi:keyvalue/store.bucket": crate::capabilities::Bucket },
    });
}

pub(crate) use bindings::mailroom::triage::claims;
pub use bindings::mailroom::triage::types::{Failure, Issue, Message, Priority, Verdict};
pub(crate) use bindings::wasi;

/// The export that makes a component a guest.
pub const HANDLER: &str = "mailroom:triage/handler@0.1.0";

/// The function in it that runs on a message.
pub const TRIAGE: &str = "triage";

/// The export of a guest that is told its configuration, and the one function in it.
pub const CONFIGURED: (&str, &str) = ("mailroom:triage/configured@0.1.0", "configure");

const QUEUE_MAX_BYTES: usize = 64;
const ISSUE_MAX_BYTES: usize = 256;
const REASONS_MAX: usize = 16;
const REASON_MAX_BYTES: usize = 256;

impl Verdict {
    /// Checks the bounds that the interface sets: the queue's name becomes part of a subject, and the rest has to
    /// stay small however hostile the guest.
    ///
    /// # Errors
    /// What is wrong with the verdict, for the dead letter.
    pub fn check(&self) -> Result<(), String> {
        let queue_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
        if self.queue.is_empty() || self.queue.len() > QUEUE_MAX_BYTES || !self.queue.bytes().all(queue_byte) {
            return Err(format!("queue {} is no queue name: 1 to 64 of a-z, 0-9, _ and -", brief(&self.queue)));
        }
        let (Issue::New(issue) | Issue::Existing(issue)) = &self.issue;
        if issue.is_empty() || issue.len() > ISSUE_MAX_BYTES || issue.chars().any(char::is_control) {
            return Err(format!("issue {} is no issue id: 1 to 256 bytes, no control characters", brief(issue)));
        }
        if self.reasons.len() > REASONS_MAX {
            return Err(format!("{} reasons; at most {REASONS_MAX}", self.reasons.len()));
        }
        match self.reasons.iter().map(String::len).find(|&len| len > REASON_MAX_BYTES) {
            Some(len) => Err(format!("a reason of {len} bytes; at most {REASON_MAX_BYTES}")),
            None => Ok(()),
        }
    }

    /// The verdict as JSON, the same on NATS, on the command line and under `wasmtime serve`;
    /// `docs/verdict.schema.json` describes it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&JsonVerdict::from(self)).expect("strings and lists always serialize")
    }
}

/// A verdict's JSON form, for output that embeds it.
#[derive(Serialize)]
pub(crate) struct JsonVerdict<'a> {
    priority: &'static str,
    issue: JsonIssue<'a>,
    queue: &'a str,
    reasons: &'a [String],
}

#[derive(Serialize)]
struct JsonIssue<'a> {
    kind: &'static str,
    id: &'a str,
}

impl<'a> From<&'a Verdict> for JsonVerdict<'a> {
    fn from(verdict: &'a Verdict) -> Self {
        let (kind, id) = match &verdict.issue {
            Issue::New(id) => ("new", id),
            Issue::Existing(id) => ("existing", id),
        };
        Self {
            priority: priority_name(verdict.priority),
            issue: JsonIssue { kind, id },
            queue: &verdict.queue,
            reasons: &verdict.reasons,
        }
    }
}

/// The priority's name in WIT and JSON.
pub(crate) fn priority_name(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low",
        Priority::Normal => "normal",
        Priority::High => "high",
        Priority::Urgent => "urgent",
    }
}

/// At most 80 characters of `text`, quoted and escaped, for an error message.
fn brief(text: &str) -> String {
    let mut quoted: String = text.chars().take(80).collect();
    if quoted.len() < text.len() {
        quoted.push('…');
    }
    format!("{quoted:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict() -> Verdict {
        Verdict {
            priority: Priority::High,
            issue: Issue::New("m-1".into()),
            queue: "support".into(),
            reasons: vec!["subject says \"down\"".into()],
        }
    }

    #[test]
    fn json_has_the_documented_form() {
        assert_eq!(
            String::from_utf8(verdict().to_json()).expect("JSON is UTF-8"),
            r#"{"priority":"high","issue":{"kind":"new","id":"m-1"},"queue":"support","reasons":["subject says \"down\""]}"#
        );
    }

    #[test]
    fn verdicts_outside_the_bounds_are_refused() {
        assert_eq!(verdict().check(), Ok(()));
        let longest = Verdict {
            queue: "q".repeat(64),
            issue: Issue::Existing("i".repeat(256)),
            reasons: vec!["r".repeat(256); 16],
            ..verdict()
        };
        assert_eq!(longest.check(), Ok(()));
        for queue in ["", "a.b", "*", ">", "Support", "ä", "a b", &"q".repeat(65)] {
            assert!(Verdict { queue: queue.into(), ..verdict() }.check().is_err(), "queue {queue:?}");
        }
        for issue in ["", "a\nb", "\0", &"i".repeat(257)] {
            assert!(Verdict { issue: Issue::New(issue.into()), ..verdict() }.check().is_err(), "issue {issue:?}");
        }
        assert!(Verdict { reasons: vec![String::new(); 17], ..verdict() }.check().is_err());
        assert!(Verdict { reasons: vec!["r".repeat(257)], ..verdict() }.check().is_err());
    }
}
