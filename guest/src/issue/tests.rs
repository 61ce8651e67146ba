//! Threads as mail programs leave them, and what memory makes of them.

use super::*;
use crate::features::person;
use crate::memory::Map;
use crate::model::{Model, Parts};
use crate::{Rules, triage, triage_with};

fn issue(mail: &str) -> Issue {
    triage(mail.as_bytes(), &Rules::defaults()).expect("a verdict").issue
}

/// The issues of mails that come one after the other.
fn issues(memory: &mut Map, mails: &[&str]) -> Vec<Issue> {
    let rules = Rules::defaults();
    mails.iter().map(|mail| triage_with(mail.as_bytes(), 0, &rules, memory).expect("a verdict").issue).collect()
}

/// Whether the first mail opens an issue, and all others belong to it.
fn are_one_issue(mails: &[&str]) -> bool {
    let issues = issues(&mut Map::default(), mails);
    let id = issues[0].id().to_owned();
    issues[0] == Issue::New(id.clone()) && issues[1..].iter().all(|issue| *issue == Issue::Existing(id.clone()))
}

const ROOT: &str = "Message-ID: <root@x>\nFrom: Ann <ann@x>\nTo: help@y\nDate: Mon, 2 Mar 2026 10:00:00 +0000\nSubject: Printer jams\n\n";
const WITHOUT_ID: &str = "From: ann@x\nTo: help@y\nDate: Mon, 2 Mar 2026 11:00:00 +0000\nSubject: Re: Printer jams\n\n";

/// However a mail program writes the thread down, a reply finds the issue of the first mail, even without memory.
#[test]
fn replies_belong_to_the_issue_of_the_first_mail() {
    let Issue::New(root) = issue("Message-ID: <root@example.org>\n\n") else { panic!("opens an issue") };
    for reply in [
        "Message-ID: <b@example.org>\nIn-Reply-To: <root@example.org>\n\n",
        "Message-ID: <c@example.org>\nReferences: <root@example.org>\n\t<b@example.org>\nIn-Reply-To: <b@example.org>\n\n",
        "References:\r\n <root@example.org>\r\n\r\n",
        "References: root@example.org b@example.org\n\n",
        "In-Reply-To: Your message of Monday <root@example.org>\n\n",
        "Subject: [5]\nReferences: < root@example.\n org>\n\n",
    ] {
        assert_eq!(issue(reply), Issue::Existing(root.clone()), "{reply}");
    }
}

/// Without a Message-ID the same bytes are the same issue.
#[test]
fn mail_without_id_is_named_after_its_bytes() {
    assert_eq!(issue("Subject: a\n\nb"), issue("Subject: a\n\nb"));
    assert_ne!(issue("Subject: a\n\nb"), issue("Subject: a\n\nc"));
}

/// A key names the issue, whatever thread it is in; who answers without the key still finds it.
#[test]
fn keys_come_before_threads() {
    let reply = "Message-ID: <b@x>\nIn-Reply-To: <a@x>\nSubject: Re: [Bug 5] x\n\n";
    assert_eq!(issue(reply), Issue::Existing("bug-5".to_owned()));
    assert!(are_one_issue(&[
        "Message-ID: <a@x>\nSubject: [Bug 5] x\n\n",
        reply,
        "References: <b@x>\nSubject: Re: y\n\n"
    ]));
}

/// A reply that names only its parent belongs to the issue that the parent belongs to.
#[test]
fn parents_are_known() {
    assert!(are_one_issue(&[
        ROOT,
        "Message-ID: <b@x>\nIn-Reply-To: <root@x>\n\n",
        "Message-ID: <c@x>\nIn-Reply-To: <b@x>\n\n",
        "Message-ID: <d@x>\nReferences: <lost@x> <c@x>\n\n",
    ]));
}

/// Mails of a thread may come in any order; whichever is first opens the issue.
#[test]
fn order_does_not_matter() {
    let b = "Message-ID: <b@x>\nReferences: <root@x>\n\n";
    let c = "Message-ID: <c@x>\nReferences: <root@x> <b@x>\nIn-Reply-To: <b@x>\n\n";
    for mails in [[ROOT, b, c], [ROOT, c, b], [b, ROOT, c], [b, c, ROOT], [c, ROOT, b], [c, b, ROOT]] {
        assert!(are_one_issue(&mails), "{mails:?}");
    }
}

/// Without any reference, the subject among the same people tells.
#[test]
fn replies_without_references_are_found_by_subject() {
    assert!(are_one_issue(&[ROOT, WITHOUT_ID]));
    let colleague = WITHOUT_ID.replace("From: ann@x", "From: bob@x\nCc: Ann@X");
    assert!(are_one_issue(&[ROOT, &colleague]));
    let stranger = WITHOUT_ID.replace("ann@x", "zoe@z").replace("To:", "Delivered-To: help@y\nTo:");
    assert!(!are_one_issue(&[ROOT, &stranger]), "another customer has the same trouble");
    let years_later = WITHOUT_ID.replace("2026", "2027");
    assert!(!are_one_issue(&[ROOT, &years_later]));
    let list = |mail: &str| mail.replace("Subject", "List-Id: Users <users.list.y>\nSubject");
    assert!(are_one_issue(&[&list(ROOT), &list(&stranger)]), "on a list all talk to all");
    assert!(!are_one_issue(&["From: ann@x\nSubject: Hi\n\n", "From: ann@x\nSubject: Re: Hi\n\n"]));
}

/// Somebody who writes the same again, before an answer comes, has one issue; a month later it is another.
#[test]
fn repeated_mails_are_one_issue() {
    let again = ROOT.replace("root@x", "again@x");
    assert!(are_one_issue(&[ROOT, &again.replace("2 Mar", "3 Mar")]));
    assert!(!are_one_issue(&[ROOT, &again.replace("2 Mar", "6 Mar")]));
    assert!(!are_one_issue(&[ROOT, &again.replace("Ann <ann@x>", "bob@x")]));
}

/// A series that is numbered in its subjects is one issue, the next version another.
#[test]
fn numbered_series_are_one_issue() {
    let part = |number: u32, version: &str| {
        format!(
            "From: ann@x\nDate: Mon, 2 Mar 2026 10:0{number}:00 +0000\nSubject: [PATCH{version} {number}/2] part {number}\n\n"
        )
    };
    let parts = [part(0, ""), part(1, ""), part(2, "")];
    assert!(are_one_issue(&parts.each_ref().map(String::as_str)));
    let answer = part(2, "").replace("From: ann@x", "From: bob@x\nTo: ann@x").replace("Subject: ", "Subject: Re: ");
    assert!(are_one_issue(&[&parts[0], &parts[2], &answer]));
    assert!(!are_one_issue(&[&part(0, ""), &part(1, " v2")]));
}

/// An alert that comes again with other numbers, or that a colleague sends too, is the same issue.
#[test]
fn nearly_the_same_text_is_found() {
    let text = "The nightly backup of the file server has not finished. The job was cancelled after it had waited for \
        the tape library, which reports that its door is open. Please close the door and start the job again, or tell \
        the night shift to do so. The last complete backup is that of Sunday, which lies in the second drawer.";
    let mail = |number: u32, day: u32| {
        format!(
            "From: {number}@x\nDate: Mon, {day} Mar 2026 10:00:00 +0000\nSubject: Job {number} failed\n\nJob {number}: {text}\n"
        )
    };
    assert!(are_one_issue(&[&mail(1, 2), &mail(2, 3), &mail(3, 4)]));
    assert!(!are_one_issue(&[&mail(1, 2), &mail(2, 12)]));
    let tagged = |number: u32| mail(number, 2).replace("Subject:", &format!("Subject: [case-file {number}]"));
    assert!(!are_one_issue(&[&tagged(1), &tagged(2)]), "somebody numbered them apart");
    assert!(!are_one_issue(&[&mail(1, 2), &mail(2, 3).replace("Job 2 failed", "Result")]), "a form that many fill in");
}

/// A mail that is delivered again gets the same verdict, whatever has come since.
#[test]
fn redelivery_changes_nothing() {
    let mails =
        [ROOT, WITHOUT_ID, "Message-ID: <b@x>\nReferences: <root@x>\n\n", "Subject: [Bug 7]\n\n", "Subject: z\n\n"];
    let mut memory = Map::default();
    let first = issues(&mut memory, &mails);
    assert_eq!(issues(&mut memory, &mails), first);
    assert_eq!(issues(&mut memory, &mails), first);
}

/// A busy issue is raised once, and each mail keeps its priority when it comes again.
#[test]
fn many_mails_raise_the_priority_once() {
    let rules = Rules::defaults();
    let mut memory = Map::default();
    let mut priority = |number: u32| {
        let minute = number * 2;
        let mail = format!(
            "Message-ID: <{number}@x>\nReferences: <root@x>\nDate: Mon, 2 Mar 2026 10:{minute:02}:00 +0000\n\nhello"
        );
        triage_with(mail.as_bytes(), 0, &rules, &mut memory).expect("a verdict").priority
    };
    let first: Vec<_> = (0..12).map(&mut priority).collect();
    // The first one opens the issue; the fifth that follows it is the sixth mail.
    let expected = |number: usize| if number < 5 { crate::Priority::Normal } else { crate::Priority::High };
    assert_eq!(first, (0..12).map(expected).collect::<Vec<_>>());
    assert_eq!((0..12).map(&mut priority).collect::<Vec<_>>(), first);
}

/// An ordinary mail takes few calls: they are what a mail costs a host most.
#[test]
fn calls_to_memory_are_few() {
    let mut memory = Map::default();
    let mut calls = |mail: &str| {
        let before = memory.calls;
        triage_with(mail.as_bytes(), 0, &Rules::defaults(), &mut memory).expect("a verdict");
        memory.calls - before
    };
    assert_eq!(calls(ROOT), 4, "opens an issue");
    assert_eq!(calls("Message-ID: <b@x>\nReferences: <root@x>\n\n"), 4, "a reply");
    assert_eq!(calls(ROOT), 1, "comes again");
}

/// What nobody of ours wrote is passed over.
#[test]
fn garbage_in_memory_is_passed_over() {
    let mut memory = Map::default();
    let first = issues(&mut memory, &[ROOT, WITHOUT_ID]);
    for garbage in [&b""[..], b"\n", b"x\n1 first", b"\xff\n1 first 1 1 1 ", b"a\tb\n1 first 1 1 1 "] {
        let mut memory = memory.clone();
        memory.spoil(garbage);
        assert_eq!(issues(&mut memory, &[ROOT])[0].id(), first[0].id());
    }
}

/// A memory that is away is not the mail's fault.
#[test]
fn absent_memory_is_no_verdict() {
    struct Gone;
    impl Memory for Gone {
        fn get_many(&mut self, _: &[String]) -> Result<Vec<Option<Vec<u8>>>, Away> {
            Err(Away("no bucket".to_owned()))
        }
        fn set_many(&mut self, _: &[(String, Vec<u8>)]) -> Result<(), Away> {
            Err(Away("no bucket".to_owned()))
        }
        fn claim(&mut self, _: &str, _: &[u8]) -> Result<Vec<u8>, Away> {
            Err(Away("no bucket".to_owned()))
        }
    }
    let answer = triage_with(ROOT.as_bytes(), 0, &Rules::defaults(), &mut Gone);
    assert_eq!(answer, Err(crate::Failure::Away("no bucket".to_owned())));
}

/// An issue goes where all its mails point, with the confidence of each. A mail that comes again gets what it got.
#[test]
fn mails_of_an_issue_speak_for_its_queue() {
    let mut people = [(person(b"ann@x"), [0, 127]), (person(b"bob@x"), [40, 0])];
    people.sort_unstable();
    let people = people.map(|(hash, weights)| [&hash.to_le_bytes()[..], &[24], &weights].concat()).concat();
    let parts = Parts {
        bits: 1,
        pairs: false,
        sharpness: 1.0,
        threshold: 0.2,
        people_share: 1.0,
        labels: &["billing", "support"].map(|name| (name.to_owned(), 0.01, 0.0)),
        rows: &[0; 6],
        people: &people,
    };
    let model = Model::write(&parts).expect("a model").leak();
    let rules = Rules::defaults().with_team_model(model).expect("rules");
    let mut memory = Map::default();
    let mut queue = |number: u32, from: &str, parent: u32| {
        let parent = if parent > 0 { format!("In-Reply-To: <{parent}@x>\n") } else { String::new() };
        let mail = format!("From: {from}@x\nMessage-ID: <{number}@x>\n{parent}Subject: a matter\n\n");
        triage_with(mail.as_bytes(), 0, &rules, &mut memory).expect("a verdict").queue
    };
    assert_eq!(queue(1, "bob", 0), "billing");
    assert_eq!(queue(2, "ann", 1), "support");
    assert_eq!(queue(3, "bob", 1), "billing");
    assert_eq!(queue(4, "ann", 3), "support");
    assert_eq!(queue(5, "bob", 1), "billing");
    assert_eq!([queue(1, "bob", 0), queue(2, "ann", 1)], ["billing", "support"]);
}
