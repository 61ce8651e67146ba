//! The triage on mails that nobody thought of.

use crate::memory::Map;
use crate::{REASON_MAX_BYTES, REASONS_MAX, Rules, Verdict, queue, triage, triage_with};
use ::fuzz::{Just, Strategy, any, check, collection, mutated, prop_oneof, sample};
use std::path::Path;

/// The sample mails.
fn samples() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/mails");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).expect("the sample mails").map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    files.into_iter().filter(|file| file.is_file()).map(|file| std::fs::read(file).expect("a mail")).collect()
}

/// Lines as mails have them, in an order that none has.
fn patchwork() -> impl Strategy<Value = Vec<u8>> {
    let name = sample::select(vec![
        "Subject",
        "From",
        "To",
        "Cc",
        "References",
        "In-Reply-To",
        "Message-ID",
        "Importance",
        "X-Priority",
        "Content-Type",
        "Content-Transfer-Encoding",
        "Content-Disposition",
        "List-Id",
        "Auto-Submitted",
        "X-Spam-Flag",
    ]);
    let value = sample::select(vec![
        "multipart/mixed; boundary=b",
        "multipart/alternative; boundary=\"b\"",
        "message/rfc822",
        "text/html; charset=utf-16",
        "text/plain; charset=\"iso-2022-jp\"",
        "base64",
        "quoted-printable",
        "=?utf-8?b?w4TDpA==?=",
        "=?x?q?=FF=?=",
        "attachment",
        "<a@b> <c@d>",
        "<",
        ">",
        "\"a\\\" b\" <help@example.com>, g: x@y;",
        "[Bug 12]",
        "Re: [#7] down",
        "urgent invoice outage",
        "1",
        "yes",
        "bulk",
        "\u{e4}\u{feff}\u{202e}",
    ]);
    let body = sample::select(vec![
        "",
        "--b",
        "--b--",
        "--b--b",
        "<html><style><p>down",
        "&#x110000;&amp",
        "=",
        "=3D=\r",
        "> quoted",
        "4pyTIGw=",
        "urgent",
        "On Monday Ann wrote:",
        "-- ",
        "\t folded",
    ]);
    let line = prop_oneof![
        (name, value, any::<bool>()).prop_map(|(name, value, fold)| {
            format!("{name}:{}{value}", if fold { "\r\n\t" } else { " " }).into_bytes()
        }),
        body.prop_map(|line| line.as_bytes().to_vec()),
        collection::vec(any::<u8>(), 0..40),
    ];
    let end = sample::select(vec!["\n", "\r\n", "\r", ""]);
    collection::vec((line, end), 0..60)
        .prop_map(|lines| lines.into_iter().flat_map(|(line, end)| [line, end.as_bytes().to_vec()].concat()).collect())
}

fn mails() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        collection::vec(any::<u8>(), 0..2_000),
        patchwork(),
        patchwork().prop_map(|body| [b"Subject: s\nContent-Type: multipart/mixed; boundary=b\n\n", &body[..]].concat()),
        sample::select(samples()).prop_flat_map(mutated),
    ]
}

fn configurations() -> impl Strategy<Value = Vec<(String, String)>> {
    let key = prop_oneof![
        sample::select(vec![
            "queue.default",
            "queue.support",
            "queue.x",
            "queue.bulk",
            "queue.",
            "priority.urgent",
            "priority.low",
            "route.1",
            "issue.keys",
            "heat.mails",
            "team.confidence",
            "",
        ])
        .prop_map(str::to_owned),
        "(queue|priority)\\.[a-z_-]{0,70}",
        "\\PC{0,10}",
    ];
    let value = prop_oneof![
        Just(String::new()),
        "[a-z, ]{0,60}",
        "\\PC{0,30}",
        "[a-z]{1,3} (from|to|subject|body|header:[a-z]) (/[a-z(|)*.]{0,8}/|[a-z]{1,8})",
        "([a-z# ]{0,5}\\{[nPx]\\}[a-z, ]{0,3}){1,3}",
        "[0-9.]{1,3}",
        collection::vec("[a-z]{1,12}( [a-z]{1,12})?", 0..40).prop_map(|words| words.join(", ")),
    ];
    collection::vec((key, value), 0..12)
}

/// Whatever the mail and the configuration: no panic, the same answer twice, and within what the interface allows.
#[test]
fn every_mail_gets_an_answer_within_the_bounds() {
    check("triage of a mail", 6_000, (mails(), configurations()), |(mail, pairs)| {
        let configured = Rules::from_config(pairs.iter().map(|(key, value)| (key, value)));
        let again = Rules::from_config(pairs.iter().rev().map(|(key, value)| (key, value)));
        let repeated = pairs.iter().enumerate().any(|(at, (key, _))| pairs[..at].iter().any(|(other, _)| key == other));
        assert!(repeated || configured.is_ok() == again.is_ok(), "the order of the configuration matters");
        let rules = configured.unwrap_or_else(|wrong| {
            assert!(!wrong.is_empty(), "a refusal without a reason");
            Rules::defaults()
        });
        let answer = triage(&mail, &rules);
        assert_eq!(answer, triage(&mail, &rules), "not the same twice");
        match answer {
            Err(reason) => assert!(!reason.is_empty()),
            Ok(verdict) => within_bounds(&verdict),
        }
    });
}

fn within_bounds(verdict: &Verdict) {
    assert!(queue::is_name(&verdict.queue), "queue {:?}", verdict.queue);
    let id = verdict.issue.id();
    assert!((1..=256).contains(&id.len()) && !id.chars().any(char::is_control), "issue {id:?}");
    assert!(verdict.reasons.len() <= REASONS_MAX, "{} reasons", verdict.reasons.len());
    for reason in &verdict.reasons {
        assert!(reason.len() <= REASON_MAX_BYTES && !reason.chars().any(char::is_control), "{reason:?}");
    }
}

/// Whatever came before: no panic, within bounds, and who comes again, in whatever order, gets the same issue, queue and
/// priority.
#[test]
fn memory_gives_any_mail_the_same_verdict_again() {
    let some = (collection::vec((mails(), 0..10_000_u64), 1..8), any::<bool>());
    check("mails with memory", 1_500, some, |(mails, backwards)| {
        let rules = Rules::defaults();
        let mut memory = Map::default();
        let mut decide = |(mail, time): &(Vec<u8>, u64)| triage_with(mail, *time, &rules, &mut memory);
        let first: Vec<_> = mails.iter().map(&mut decide).collect();
        first.iter().flatten().for_each(within_bounds);
        let numbers: Vec<usize> = if backwards { (0..mails.len()).rev().collect() } else { (0..mails.len()).collect() };
        for number in numbers {
            let again = decide(&mails[number]);
            let decided = |verdict: &Verdict| (verdict.issue.clone(), verdict.queue.clone(), verdict.priority);
            // Two mails with one Message-ID are one mail, and the first of them counts.
            let is_alone = mails.iter().filter(|(mail, _)| own(mail) == own(&mails[number].0)).count() == 1;
            if is_alone {
                assert_eq!(again.as_ref().map(decided), first[number].as_ref().map(decided), "mail {number}");
            }
        }
    });
}

fn own(mail: &[u8]) -> Option<u64> {
    crate::mail::Mail::read(mail).ok().map(|mail| crate::thread::Thread::read(&mail).own)
}
