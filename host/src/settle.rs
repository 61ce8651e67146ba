//! What becomes of a message: pure decisions, no I/O. The settlement table of `docs/architecture.md` in code.

use crate::handler::{Failure, Fault};
use crate::interface::Verdict;
use std::time::Duration;

/// The operator's bounds on trying again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Deliveries after which a message that breaks its instance goes to the dead letters.
    pub attempts: u64,
    /// Deliveries after which a message goes to the dead letters without being run: it may have killed hosts.
    pub max_deliver: u64,
    /// Largest message that is run, in bytes: payload and headers.
    pub message_max_bytes: usize,
    /// The shortest wait before a message is delivered again.
    pub retry_min: Duration,
    /// The longest wait before a message is delivered again.
    pub retry_max: Duration,
    /// From which wait on a message waits parked, and not at the consumer.
    pub park_after: Duration,
}

/// What the host does with a message, once its guest is done or was not run.
#[derive(Debug)]
pub enum Settlement {
    /// Publish the verdict, await its PubAck, acknowledge the message.
    Verdict(Verdict),
    /// Let it be delivered again after this time.
    Again(Duration, DeadReason, String),
    /// Store it in the dead letters, then terminate it.
    Dead(DeadReason, String),
}

/// Why a message is tried again or dead: the header `Mailroom-Reason`, and the label `reason` in metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadReason(&'static str);

impl DeadReason {
    /// The guest rejected the message.
    pub const REJECTED: Self = Self("rejected");
    /// The guest asked for another delivery.
    pub const RETRY: Self = Self("retry");
    /// The message came too often to be run once more.
    pub const MAX_DELIVER: Self = Self("max-deliver");
    /// The message is where replays belong and is none.
    pub const REPLAY: Self = Self("replay");
    /// The message is too large to be run.
    pub const MESSAGE_TOO_LARGE: Self = Self("message-too-large");
    /// The NATS client library cannot read the message.
    pub const UNREADABLE: Self = Self("unreadable-headers");

    /// Those that a dead letter may have.
    pub const DEAD: [Self; 11] = [
        Self::REJECTED,
        Self(Fault::Trap.name()),
        Self(Fault::Deadline.name()),
        Self(Fault::Memory.name()),
        Self(Fault::Stack.name()),
        Self(Fault::Output.name()),
        Self(Fault::HostCalls.name()),
        Self::REPLAY,
        Self::MESSAGE_TOO_LARGE,
        Self::MAX_DELIVER,
        Self::UNREADABLE,
    ];

    /// The reason's name in headers and metrics.
    pub fn name(self) -> &'static str {
        self.0
    }
}

/// Whether a message of `bytes`, payload and headers, may be run at its `delivery`th delivery (the first is 1), or is
/// dead without.
pub fn admit(delivery: u64, bytes: usize, policy: &Policy) -> Option<Settlement> {
    let max_bytes = policy.message_max_bytes;
    if bytes > max_bytes {
        let detail = format!("{bytes} bytes with its headers; at most {max_bytes} are run");
        return Some(Settlement::Dead(DeadReason::MESSAGE_TOO_LARGE, detail));
    }
    (delivery > policy.max_deliver).then(|| {
        Settlement::Dead(
            DeadReason::MAX_DELIVER,
            format!("delivered {delivery} times without an end; at most {} are run", policy.max_deliver),
        )
    })
}

/// What `outcome` means for the message at its `delivery`th delivery (the first is 1).
///
/// `spread` in 0..=1 places the wait within its range, so that messages that failed together do not come back
/// together.
pub fn settle(outcome: Result<Verdict, Failure>, delivery: u64, policy: &Policy, spread: f64) -> Settlement {
    match outcome {
        Ok(verdict) => Settlement::Verdict(verdict),
        Err(Failure::Rejected(reason)) => Settlement::Dead(DeadReason::REJECTED, reason),
        Err(Failure::Retry(after, reason)) => {
            let wait = after.map_or_else(
                || back_off(delivery, policy, spread),
                |after| after.clamp(policy.retry_min, policy.retry_max),
            );
            Settlement::Again(wait, DeadReason::RETRY, reason)
        }
        Err(Failure::Broken(fault, detail)) if delivery >= policy.attempts => {
            Settlement::Dead(DeadReason(fault.name()), detail)
        }
        Err(Failure::Broken(fault, detail)) => {
            Settlement::Again(back_off(delivery, policy, spread), DeadReason(fault.name()), detail)
        }
    }
}

/// The wait after the `delivery`th delivery: doubles from `retry_min` up to `retry_max`, then shortened by up to
/// half.
fn back_off(delivery: u64, policy: &Policy, spread: f64) -> Duration {
    let doublings = u32::try_from(delivery.saturating_sub(1)).unwrap_or(u32::MAX).min(31);
    let wait = policy.retry_min.saturating_mul(1 << doublings).min(policy.retry_max);
    wait.mul_f64(0.5 + spread.clamp(0.0, 1.0) / 2.0).max(policy.retry_min.min(policy.retry_max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::{Issue, Priority};

    const SECOND: Duration = Duration::from_secs(1);

    fn policy() -> Policy {
        Policy {
            attempts: 5,
            max_deliver: 20,
            message_max_bytes: 100,
            retry_min: SECOND,
            retry_max: 60 * SECOND,
            park_after: 30 * SECOND,
        }
    }

    fn shown(settlement: Settlement) -> String {
        if let Settlement::Dead(reason, _) = &settlement {
            assert!(DeadReason::DEAD.contains(reason), "{reason:?}");
        }
        match settlement {
            Settlement::Verdict(verdict) => format!("verdict {}", verdict.queue),
            Settlement::Again(wait, reason, _) => format!("again {} {:?}", reason.name(), wait),
            Settlement::Dead(reason, _) => format!("dead {}", reason.name()),
        }
    }

    #[test]
    fn every_outcome_has_its_settlement() {
        let verdict = Verdict {
            priority: Priority::Low,
            issue: Issue::New("i".into()),
            queue: "support".into(),
            reasons: Vec::new(),
        };
        let broken = |fault| Err(Failure::Broken(fault, "why".into()));
        let retry = |after: Option<u64>| Err(Failure::Retry(after.map(Duration::from_secs), "why".into()));
        for (outcome, delivery, expected) in [
            (Ok(verdict.clone()), 1, "verdict support"),
            (Ok(verdict), 20, "verdict support"),
            (Err(Failure::Rejected("why".into())), 1, "dead rejected"),
            (retry(Some(5)), 1, "again retry 5s"),
            (retry(Some(0)), 1, "again retry 1s"),
            (retry(Some(3600)), 1, "again retry 60s"),
            (retry(None), 3, "again retry 4s"),
            (retry(None), 19, "again retry 60s"),
            (broken(Fault::Trap), 1, "again trap 1s"),
            (broken(Fault::Trap), 4, "again trap 8s"),
            (broken(Fault::Trap), 5, "dead trap"),
            (broken(Fault::Deadline), 5, "dead deadline"),
            (broken(Fault::Memory), 6, "dead memory"),
            (broken(Fault::Stack), 5, "dead stack"),
            (broken(Fault::Output), 5, "dead output"),
            (broken(Fault::HostCalls), 4, "again host-calls 8s"),
            (broken(Fault::HostCalls), 5, "dead host-calls"),
        ] {
            let label = format!("{outcome:?} at delivery {delivery}");
            assert_eq!(shown(settle(outcome, delivery, &policy(), 1.0)), expected, "{label}");
        }
    }

    #[test]
    fn a_message_that_came_too_often_or_is_too_large_is_not_run() {
        for (delivery, bytes, expected) in [
            (1, 0, None),
            (20, 100, None),
            (21, 100, Some("dead max-deliver")),
            (1, 101, Some("dead message-too-large")),
            (21, 101, Some("dead message-too-large")),
        ] {
            assert_eq!(admit(delivery, bytes, &policy()).map(shown).as_deref(), expected, "{delivery}, {bytes}");
        }
    }

    #[test]
    fn back_off_stays_within_its_bounds() {
        for delivery in [0, 1, 2, 7, 40, u64::MAX] {
            for spread in [0.0, 0.3, 1.0, 7.0] {
                let wait = back_off(delivery, &policy(), spread);
                assert!(wait >= SECOND && wait <= 60 * SECOND, "{wait:?} at {delivery}, {spread}");
            }
        }
        assert_eq!(back_off(5, &policy(), 0.0), 8 * SECOND);
        assert_eq!(back_off(5, &policy(), 1.0), 16 * SECOND);
    }
}
