//! What a subject says once everything is off that mail programs and mailing lists put before it.

use memchr::{memchr, memmem};

use crate::words::lower;

/// Words before a colon that make a subject that of a reply, in lower case, of many languages.
const REPLIES: &[&str] = &[
    "re", "aw", "antw", "antwort", "sv", "vs", "ref", "rif", "r", "res", "rv", "rép", "odp", "ynt", "bls", "trs", "vá",
    "atb", "ats", "hal", "nl", "отв", "ha", "на", "回复", "回覆", "答复", "返信", "σχετ", "απ", "yan", "refer",
];
/// The same of a forwarded mail.
const FORWARDS: &[&str] = &[
    "tr",
    "fw",
    "fwd",
    "wg",
    "vl",
    "vb",
    "doorst",
    "pd",
    "enc",
    "i",
    "ilt",
    "továbbítás",
    "轉寄",
    "转发",
    "転送",
    "πρθ",
];
/// A tag in square brackets is no longer than this, brackets and all.
const TAG_MAX_BYTES: usize = 60;
/// At most this much of a subject is read.
const SUBJECT_MAX_BYTES: usize = 500;
/// As many prefixes and tags are taken off: nobody replies more often than that.
const PREFIXES_MAX: usize = 50;

/// A subject without prefixes and list tags.
#[derive(Debug, PartialEq, Eq)]
pub struct Subject {
    /// In lower case, with single spaces. Tags with a digit (`[PATCH v2 1/3]`, `[#12]`) stay, they tell mails apart.
    pub text: Vec<u8>,
    /// Where in `text` the tags that stayed end.
    tags_end: usize,
    /// Whether a prefix says that it answers something.
    pub is_reply: bool,
    /// Whether a prefix says that it forwards something.
    pub is_forward: bool,
}

impl Subject {
    /// Reads a decoded subject.
    pub fn read(subject: &[u8]) -> Subject {
        let subject = &subject[..subject.len().min(SUBJECT_MAX_BYTES)];
        let mut all = Vec::with_capacity(subject.len());
        for word in subject.split(|byte| byte.is_ascii_whitespace() || *byte == 0).filter(|word| !word.is_empty()) {
            if !all.is_empty() {
                all.push(b' ');
            }
            for &byte in word {
                let byte = lower(all.last().copied().unwrap_or_default(), byte);
                all.push(byte);
            }
        }
        let (mut is_reply, mut is_forward) = (false, false);
        let mut kept = Vec::new();
        let mut rest = &all[..];
        for _ in 0..PREFIXES_MAX {
            rest = rest.trim_ascii_start();
            if let Some((forwards, after)) = split_prefix(rest) {
                is_forward |= forwards;
                is_reply |= !forwards;
                rest = after;
            } else if let Some((tag, after)) = split_tag(rest).filter(|(_, after)| !after.is_empty()) {
                if tag.iter().any(u8::is_ascii_digit) {
                    kept.extend_from_slice(tag);
                    kept.push(b' ');
                }
                rest = after;
            } else {
                break;
            }
        }
        for end in [&b"(was:"[..], b"(was ", b"[was:", b"(fwd)"] {
            if let Some(at) = memmem::find(rest, end).filter(|&at| at > 0) {
                rest = rest[..at].trim_ascii_end();
            }
        }
        let tags_end = kept.len();
        kept.extend_from_slice(rest);
        Subject { text: kept, tags_end, is_reply, is_forward }
    }

    /// What it says, without any tags.
    pub fn topic(&self) -> &[u8] {
        &self.text[self.tags_end..]
    }

    /// The tags that stayed.
    pub fn tags(&self) -> &[u8] {
        &self.text[..self.tags_end]
    }

    /// What it says, without any tags and without words with a digit.
    pub fn topic_without_numbers(&self) -> Vec<u8> {
        let words = self.topic().split(|&byte| byte == b' ');
        words.filter(|word| !word.iter().any(u8::is_ascii_digit)).collect::<Vec<_>>().join(&b' ')
    }

    /// Whether it says enough to tell one issue from another: two words, or one of five bytes.
    pub fn is_telling(&self) -> bool {
        let topic = self.topic();
        topic.len() >= 5 && topic.iter().filter(|byte| byte.is_ascii_alphanumeric() || **byte >= 128).count() >= 4
    }

    /// What the mails of a numbered series (`[PATCH v2 1/3]`, `[2/3]`) have in common; none if it is not numbered.
    pub fn series(&self) -> Option<Vec<u8>> {
        let tags = self.tags();
        let mut from = 0;
        while let Some(found) = memchr(b'/', &tags[from..]) {
            let slash = from + found;
            let before = tags[..slash].iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
            let after = tags[slash + 1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            if (1..=4).contains(&before) && (1..=4).contains(&after) {
                // Without the number of the mail, with that of all of them.
                return Some([&tags[..slash - before], &tags[slash..]].concat());
            }
            from = slash + 1;
        }
        None
    }
}

/// Whether the prefix that a subject begins with only forwards, and what follows prefix, counter and colon.
fn split_prefix(subject: &[u8]) -> Option<(bool, &[u8])> {
    let colon = memchr(b':', &subject[..subject.len().min(24)]);
    // The colon of Chinese and Japanese mail programs.
    let wide = memmem::find(&subject[..subject.len().min(24)], "：".as_bytes());
    let (end, after) = match (colon, wide) {
        (Some(colon), None) => (colon, colon + 1),
        (None, Some(wide)) => (wide, wide + 3),
        (Some(colon), Some(wide)) if colon < wide => (colon, colon + 1),
        (Some(_), Some(wide)) => (wide, wide + 3),
        (None, None) => return None,
    };
    let mut word = subject[..end].trim_ascii_end();
    // "Re[2]:", "RE (3):", "Re^2:", "Re2:"
    while let [inner @ .., b'0'..=b'9' | b'[' | b']' | b'(' | b')' | b'^' | b' '] = word {
        word = inner;
    }
    let is_in = |list: &[&str]| list.iter().any(|known| known.as_bytes() == word);
    let forwards = is_in(FORWARDS);
    (forwards || is_in(REPLIES)).then_some((forwards, &subject[after..]))
}

/// The tag in square brackets a subject begins with, brackets included, and what follows it.
fn split_tag(subject: &[u8]) -> Option<(&[u8], &[u8])> {
    if subject.first() != Some(&b'[') {
        return None;
    }
    let end = memchr(b']', &subject[..subject.len().min(TAG_MAX_BYTES)])?;
    Some((&subject[..=end], subject[end + 1..].trim_ascii_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(subject: &str) -> Subject {
        Subject::read(subject.as_bytes())
    }

    /// However mail programs and lists decorate a subject, it stays the same.
    #[test]
    fn decorations_are_taken_off() {
        for subject in [
            "Printer on fire",
            "Re: Printer on  fire",
            "RE: AW: Re[2]: printer on\r\n\tfire",
            "[list] Re: Printer on fire",
            "Re: [EXTERNAL] [list] Fwd: Printer on fire",
            "SV: Printer on fire (was: Toner)",
            "回复：Printer on fire",
            "Re:Printer on fire",
        ] {
            assert_eq!(String::from_utf8_lossy(&read(subject).text), "printer on fire", "{subject}");
        }
        for (subject, expected) in [
            ("Re: [PATCH v2 1/3] md: Fix", "[patch v2 1/3] md: fix"),
            ("[Bug 12] New: crash", "[bug 12] new: crash"),
            ("Registry: question", "registry: question"),
            ("[alone]", "[alone]"),
            ("Re:", ""),
            ("ÜBER: x", "über: x"),
        ] {
            assert_eq!(String::from_utf8_lossy(&read(subject).text), expected, "{subject}");
        }
    }

    /// A forwarded mail is not an answer.
    #[test]
    fn replies_and_forwards_are_told_apart() {
        assert!(read("AW: x").is_reply && !read("AW: x").is_forward);
        assert!(read("WG: x").is_forward && !read("WG: x").is_reply);
        assert!(!read("Regarding: x").is_reply);
    }

    /// The parts of one series are recognised, those of its next version are another series.
    #[test]
    fn numbered_series_are_recognised() {
        assert_eq!(read("[PATCH v2 0/3] a").series(), read("[PATCH v2 3/3] b").series());
        assert!(read("[PATCH v2 0/3] a").series().is_some());
        assert_ne!(read("[PATCH v2 0/3] a").series(), read("[PATCH v3 0/3] a").series());
        assert_eq!(read("[PATCH v2] and/or 1/2").series(), None);
        assert_eq!(read("1/2 of it").series(), None);
    }
}
