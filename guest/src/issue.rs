//! Which issue the mail belongs to, with ids that need no agreement between hosts.
//!
//! The id of a thread is a hash of its first mail's Message-ID. That mail gets it as a new issue, and every reply
//! finds the same Message-ID in its `References`: hosts that never talk to each other give both the same id.
//!
//! 1. A reply (`References`, else `In-Reply-To`) belongs to its thread: `m-` and 16 hexadecimal digits.
//! 2. Else a key in the subject names the issue: `[#123]` is `#123`, `[Bug 123]` is `bug-123`, `[ABC-123]` is
//!    itself; so are `[Ticket 123]`, `[Case 123]`, `[Issue 123]`, each with or without `#`.
//! 3. Else the mail opens an issue: the hash of its Message-ID, or without one, of all its bytes.

use std::fmt::Write as _;

use memchr::{memchr, memchr_iter};

use crate::Reasons;
use crate::mail::Mail;

/// What a mail is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Issue {
    /// Nothing known: the mail opens the issue with this id.
    New(String),
    /// The mail belongs to the issue with this id.
    Existing(String),
}

impl Issue {
    /// The id, whether new or not.
    pub fn id(&self) -> &str {
        match self {
            Issue::New(id) | Issue::Existing(id) => id,
        }
    }

    /// `new` or `existing`, as it is written in a verdict.
    pub const fn kind(&self) -> &'static str {
        match self {
            Issue::New(_) => "new",
            Issue::Existing(_) => "existing",
        }
    }
}

/// Finds the issue of a mail.
pub(crate) fn identify(mail: &Mail<'_>, reasons: &mut Reasons) -> Issue {
    for (field, reason) in [
        (mail.fields.references, "References header: reply in a thread"),
        (mail.fields.in_reply_to, "In-Reply-To header: reply in a thread"),
    ] {
        if let Some(root) = first_id(field) {
            reasons.add(&[reason]);
            return Issue::Existing(hashed(root));
        }
    }
    if let Some(key) = key_in(&mail.subject) {
        reasons.add(&["subject carries the issue key ", &key]);
        return Issue::Existing(key);
    }
    match first_id(mail.fields.message_id) {
        Some(id) => Issue::New(hashed(id)),
        None => {
            reasons.add(&["no Message-ID: the issue is named after the content"]);
            Issue::New(hashed(mail.data))
        }
    }
}

/// The first id in the field, without angle brackets. Without brackets: the first word that looks like an id.
fn first_id(field: &[u8]) -> Option<&[u8]> {
    if let Some(start) = memchr(b'<', field) {
        let rest = &field[start + 1..];
        let id = memchr(b'>', rest).map_or(rest, |end| &rest[..end]).trim_ascii();
        return (!id.is_empty()).then_some(id);
    }
    field.split(u8::is_ascii_whitespace).find(|word| memchr(b'@', word).is_some())
}

fn hashed(bytes: &[u8]) -> String {
    let mut id = String::with_capacity(18);
    let written = write!(id, "m-{:016x}", fnv1a(bytes));
    debug_assert!(written.is_ok());
    id
}

/// The 64-bit FNV-1a hash: the same everywhere and for ever, which ids have to be. White space that folding put
/// into an id is left out.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .filter(|byte| !byte.is_ascii_whitespace())
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The first issue key in square brackets.
fn key_in(subject: &[u8]) -> Option<String> {
    memchr_iter(b'[', subject).find_map(|start| {
        let rest = &subject[start + 1..];
        // The longest key, "Ticket #" with its number, fits.
        let rest = &rest[..rest.len().min(40)];
        let inside = rest[..memchr(b']', rest)?].trim_ascii();
        key_of(std::str::from_utf8(inside).ok()?)
    })
}

fn key_of(inside: &str) -> Option<String> {
    let number = |text: &str| matches!(text.len(), 1..=18) && text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(digits) = inside.strip_prefix('#') {
        return number(digits).then(|| inside.to_owned());
    }
    if let Some((kind, rest)) = inside.split_once(' ') {
        let kind = kind.to_ascii_lowercase();
        let rest = rest.trim_start();
        let digits = rest.strip_prefix('#').unwrap_or(rest);
        let is_kind = ["bug", "case", "issue", "ticket"].contains(&kind.as_str());
        return (is_kind && number(digits)).then(|| kind + "-" + digits);
    }
    let (project, digits) = inside.rsplit_once('-')?;
    let is_project = matches!(project.len(), 2..=10)
        && project.starts_with(|c: char| c.is_ascii_uppercase())
        && project.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    (is_project && number(digits)).then(|| inside.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rules, triage};

    fn issue(mail: &str) -> Issue {
        triage(mail.as_bytes(), &Rules::defaults()).expect("a verdict").issue
    }

    /// The published test vectors; another hash would give every open thread a new id.
    #[test]
    fn hash_is_fnv1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    /// However a mail program writes the thread down, a reply finds the issue of the first mail.
    #[test]
    fn replies_belong_to_the_issue_of_the_first_mail() {
        let Issue::New(root) = issue("Message-ID: <root@example.org>\n\n") else { panic!("opens an issue") };
        for reply in [
            "Message-ID: <b@example.org>\nIn-Reply-To: <root@example.org>\n\n",
            "Message-ID: <c@example.org>\nReferences: <root@example.org>\n\t<b@example.org>\nIn-Reply-To: <b@example.org>\n\n",
            "References:\r\n <root@example.org>\r\n\r\n",
            "References: root@example.org b@example.org\n\n",
            "In-Reply-To: Your message of Monday <root@example.org>\n\n",
            "Subject: [#5]\nReferences: < root@example.\n org>\n\n",
        ] {
            assert_eq!(issue(reply), Issue::Existing(root.clone()), "{reply}");
        }
    }

    /// A key that a ticket system put into the subject is kept.
    #[test]
    fn keys_in_the_subject_are_found() {
        for (subject, expected) in [
            ("Re: [#123] printer", Some("#123")),
            ("[Bug 42] crash", Some("bug-42")),
            ("[ticket #7]", Some("ticket-7")),
            ("[list] [OPS-9] disk", Some("OPS-9")),
            ("[list] hello", None),
            ("[A-1] [abc-1] [ABC-x] [#] [Bug] [Bug x] #5 (#6) [#7", None),
            ("[\u{e9}t\u{e9}] [OPS-10]", Some("OPS-10")),
        ] {
            assert_eq!(key_in(subject.as_bytes()).as_deref(), expected, "{subject}");
        }
    }

    /// Without a Message-ID the same bytes are the same issue.
    #[test]
    fn mail_without_id_is_named_after_its_bytes() {
        assert_eq!(issue("Subject: a\n\nb"), issue("Subject: a\n\nb"));
        assert_ne!(issue("Subject: a\n\nb"), issue("Subject: a\n\nc"));
    }
}
