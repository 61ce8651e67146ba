//! The sample mails in `tests/mails`, and what becomes of them. The table is the specification of the rules.

use std::fs;
use std::path::PathBuf;

use super::*;

/// A sample mail with the decisions that its name promises; none: rejected.
type Sample = (&'static str, Option<(&'static str, &'static str, &'static str)>);

const SAMPLES: &[Sample] = &[
    ("01-outage", Some(("urgent", "new", "operations"))),
    ("02-outage-reply", Some(("urgent", "existing", "operations"))),
    ("03-outage-second-reply", Some(("normal", "existing", "operations"))),
    ("04-invoice-question", Some(("normal", "new", "billing"))),
    ("05-addressed-to-billing", Some(("normal", "new", "billing"))),
    ("06-payment-overdue", Some(("high", "new", "billing"))),
    ("07-security-report", Some(("high", "new", "security"))),
    ("08-account-hacked", Some(("urgent", "new", "security"))),
    ("09-sales-request", Some(("normal", "new", "sales"))),
    ("10-support-password", Some(("normal", "new", "support"))),
    ("11-high-priority-header", Some(("high", "new", "inbox"))),
    ("12-low-priority-header", Some(("low", "new", "inbox"))),
    ("13-ticket-key", Some(("normal", "existing", "operations"))),
    ("14-bug-key", Some(("normal", "existing", "support"))),
    ("15-project-key", Some(("normal", "existing", "operations"))),
    ("16-newsletter", Some(("low", "new", "bulk"))),
    ("17-mailing-list", Some(("low", "new", "bulk"))),
    ("18-auto-reply", Some(("low", "existing", "inbox"))),
    ("19-bounce", Some(("low", "new", "operations"))),
    ("20-spam", Some(("low", "new", "bulk"))),
    ("21-german-outage", Some(("urgent", "new", "operations"))),
    ("22-german-invoice-latin1", Some(("normal", "new", "billing"))),
    ("23-french-refund", Some(("normal", "new", "billing"))),
    ("24-french-failure", Some(("urgent", "new", "support"))),
    ("25-multipart-alternative", Some(("normal", "new", "support"))),
    ("26-html-only", Some(("normal", "new", "sales"))),
    ("27-attachment", Some(("normal", "new", "billing"))),
    ("28-attachment-first", Some(("normal", "new", "support"))),
    ("29-forwarded-as-attachment", Some(("normal", "new", "billing"))),
    ("30-very-short", Some(("normal", "new", "inbox"))),
    ("31-no-message-id", Some(("normal", "new", "inbox"))),
    ("32-eight-bit-header", Some(("normal", "new", "support"))),
    ("33-mbox-line", Some(("low", "new", "inbox"))),
    ("34-signature-and-download", Some(("normal", "new", "inbox"))),
    ("35-monitoring-alert", Some(("high", "new", "operations"))),
    ("36-outlook-reply", Some(("normal", "existing", "inbox"))),
    ("37-unsubscribable-invoice", Some(("low", "new", "billing"))),
    ("38-truncated-multipart", Some(("high", "new", "support"))),
    ("39-not-a-mail", None),
    ("40-empty", None),
];

fn sample(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/mails").join(name).with_extension("eml");
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every kind of mail gets the priority, kind of issue and queue that the table says.
#[test]
fn samples_are_decided_as_specified() {
    let rules = Rules::defaults();
    let mut wrong = Vec::new();
    for (name, expected) in SAMPLES {
        let verdict = triage(&sample(name), &rules);
        let decided = verdict.as_ref().ok().map(|v| (v.priority.as_str(), v.issue.kind(), v.queue.as_str()));
        if decided != *expected {
            wrong.push(format!("{name}: expected {expected:?}, got {verdict:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// No sample is forgotten in the table.
#[test]
fn every_sample_is_specified() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/mails");
    let mut names: Vec<_> = fs::read_dir(folder)
        .expect("the samples")
        .map(|entry| PathBuf::from(entry.expect("an entry").file_name()).with_extension("").display().to_string())
        .collect();
    names.sort();
    assert_eq!(names, SAMPLES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
}

/// A reply, and the reply to that, belong to the issue that the first mail opened.
#[test]
fn a_thread_is_one_issue() {
    let issue = |name| triage(&sample(name), &Rules::defaults()).expect("a verdict").issue;
    let root = issue("01-outage");
    assert_eq!(root.kind(), "new");
    for reply in ["02-outage-reply", "03-outage-second-reply"] {
        assert_eq!(issue(reply), Issue::Existing(root.id().to_owned()), "{reply}");
    }
}

/// Line ends make no difference: a mail is judged the same whether it came over SMTP or from a file.
#[test]
fn line_ends_make_no_difference() {
    let rules = Rules::defaults();
    for (name, expected) in SAMPLES.iter().filter(|(_, expected)| expected.is_some()) {
        let text = sample(name);
        let bare: Vec<u8> = text.iter().copied().filter(|&byte| byte != b'\r').collect();
        let full = bare.iter().fold(Vec::new(), |mut full, &byte| {
            if byte == b'\n' {
                full.push(b'\r');
            }
            full.push(byte);
            full
        });
        for text in [bare, full] {
            let verdict = triage(&text, &rules).expect(name);
            let decided = (verdict.priority.as_str(), verdict.issue.kind(), verdict.queue.as_str());
            assert_eq!(Some(decided), *expected, "{name}");
        }
    }
}

/// Reasons are few, short and printable, and the queue is a queue name, whatever the mail.
fn check(data: &[u8], rules: &Rules) {
    let Ok(verdict) = triage(data, rules) else { return };
    assert!(queue::is_name(&verdict.queue), "{verdict:?}");
    assert!((1..=256).contains(&verdict.issue.id().len()), "{verdict:?}");
    assert!(!verdict.issue.id().contains(char::is_control), "{verdict:?}");
    assert!(verdict.reasons.len() <= REASONS_MAX, "{verdict:?}");
    for reason in &verdict.reasons {
        assert!(reason.len() <= REASON_MAX_BYTES && !reason.contains(char::is_control), "{verdict:?}");
    }
}

/// A mail may end anywhere.
#[test]
fn truncated_mails_do_not_panic() {
    let rules = Rules::defaults();
    for (name, _) in SAMPLES {
        let data = sample(name);
        for length in 0..data.len() {
            check(&data[..length], &rules);
        }
    }
}

/// Nor does it matter which bytes are damaged, doubled or missing.
#[test]
fn damaged_mails_do_not_panic() {
    let rules = Rules::defaults();
    let mut state = 1_u64;
    let mut random = |below: usize| {
        // A linear congruential generator with Knuth's constants: the same damage in every run.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for (name, _) in SAMPLES {
        let whole = sample(name);
        for _ in 0..300 {
            let mut data = whole.clone();
            for _ in 0..=random(8) {
                let at = random(data.len());
                match random(4) {
                    0 => data[at] = random(256) as u8,
                    1 => data[at] = b"\r\n\t <>@=?-:;,\"&_>"[random(17)],
                    2 => data.extend_from_within(at.min(data.len() / 2)..),
                    _ if data.len() > 1 => drop(data.remove(at)),
                    _ => {}
                }
            }
            check(&data, &rules);
        }
    }
}

/// Deep nesting ends the search, not the program.
#[test]
fn deep_nesting_is_harmless() {
    let rules = Rules::defaults();
    let forwarded = b"Content-Type: message/rfc822\n\n".repeat(100_000);
    check(&[b"Subject: a\n", forwarded.as_slice()].concat(), &rules);
    let mut nested = String::from("Subject: a\n");
    for level in 0..10_000 {
        nested += &format!("Content-Type: multipart/mixed; boundary=b{level}\n\n--b{level}\n");
    }
    check(nested.as_bytes(), &rules);
}
