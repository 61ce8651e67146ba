//! The triage as a native function, with the host's own source, sink and settlement: what the sandbox is measured
//! against. `guest/component` is the same as a component.

use host::native::{Failure, Issue, Message, Priority, Verdict};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Nobody who writes a native handler would read the configuration again for every message.
    host::native::main(|configuration| {
        let rules = guest::Rules::from_config(configuration.iter().map(|(key, value)| (key, value)));
        let rules = rules.map_err(|error| format!("configuration: {error}"))?;
        Ok(move |message: &Message| triage(message, &rules))
    })
}

fn triage(message: &Message, rules: &guest::Rules) -> Result<Verdict, Failure> {
    let verdict = guest::triage(&message.data, rules).map_err(Failure::Reject)?;
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
