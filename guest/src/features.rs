//! A mail as numbers that a linear model can weigh: its words and pieces of words, hashed and counted.
//!
//! | taken from | features |
//! |---|---|
//! | subject, without prefixes and tags | words, pairs of neighbours, runs of [`GRAM_BYTES`] bytes; and its words again as words of the text |
//! | text, the quoted part too | words; for some models pairs of neighbours |
//! | sender | address, domain |
//! | form | HTML or plain, whether it is a reply, whether it came over a list |
//! | sender and addressees | for some models the people that are known to write ([`people`]) |
//!
//! Numbers and addresses in the text say nothing and are left out. So are the names of mailboxes and lists: what a mail
//! is about should decide, and to send mail by its addressee takes a rule, no learning.

use memchr::memchr;

use crate::mail::Mail;
use crate::subject::Subject;
use crate::words::is_word;

/// At most this much of the text is read.
const TEXT_MAX_BYTES: usize = 16 * 1024;
/// At most so many different features are counted.
const FEATURES_MAX: usize = 4096;
/// A longer word is passed over: encoded data, not language.
const WORD_MAX_BYTES: usize = 40;
/// As many bytes of a subject make a feature.
pub const GRAM_BYTES: usize = 4;

/// Where a feature is from; keeps equal words in different places apart.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Place {
    Text = 0x811c_9dc5,
    Subject = 0x1b87_3593,
    Gram = 0x85eb_ca6b,
    Sender = 0xc2b2_ae35,
    Form = 0x27d4_eb2f,
    Person = 0x9e37_79b9,
}

/// The features of a mail, each with how often it occurs.
pub struct Features {
    /// Hash and count; a count of 0 is a free place. At least half are free.
    places: Vec<(u32, u32)>,
    used: usize,
}

impl Features {
    /// Reads a mail; with `pairs` also the pairs of words in its text.
    pub fn of(mail: &Mail<'_>, pairs: bool) -> Features {
        // A word and its separator take three bytes or more, nearly always.
        let words = mail.text.len().min(TEXT_MAX_BYTES) / if pairs { 2 } else { 3 };
        let expected = (words + 2 * mail.subject.len() + 64).min(FEATURES_MAX);
        let mut features = Features { places: vec![(0, 0); (2 * expected).next_power_of_two()], used: 0 };
        features.read(mail, pairs);
        features
    }

    /// Hashes and counts.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> {
        self.places.iter().copied().filter(|&(_, count)| count > 0)
    }

    fn read(&mut self, mail: &Mail<'_>, pairs: bool) {
        let subject = Subject::read(&mail.subject);
        let mut before = None;
        each_word(subject.topic(), |word| {
            self.note(hash(Place::Text, word));
            let hash = hash(Place::Subject, word);
            self.note(hash);
            if let Some(before) = before.replace(hash) {
                self.note(pair(before, hash));
            }
        });
        for gram in subject.topic().windows(GRAM_BYTES) {
            self.note(hash(Place::Gram, gram));
        }
        if let Some(sender) = mail.sender() {
            let at = memchr::memrchr(b'@', sender).unwrap_or(0);
            self.note(hash(Place::Sender, sender));
            self.note(hash(Place::Sender, &sender[at..]));
        }
        for (form, is_so) in [
            (&b"html"[..], mail.is_html),
            (b"reply", subject.is_reply),
            (b"forward", subject.is_forward),
            (b"list", mail.list().is_some()),
        ] {
            if is_so {
                self.note(hash(Place::Form, form));
            }
        }
        let mut read = 0;
        mail.text_by_origin(|_, text| {
            let text = &text[..text.len().min(TEXT_MAX_BYTES - read)];
            read += text.len();
            let mut before = None;
            each_word(text, |word| {
                let hash = hash(Place::Text, word);
                self.note(hash);
                if let Some(before) = before.replace(hash).filter(|_| pairs) {
                    self.note(pair(before, hash));
                }
            });
        });
    }

    fn note(&mut self, hash: u32) {
        let mask = self.places.len() - 1;
        let mut at = hash as usize & mask;
        while self.places[at].1 > 0 && self.places[at].0 != hash {
            at = (at + 1) & mask;
        }
        let (known, count) = &mut self.places[at];
        if *count > 0 {
            *count += 1;
        } else if self.used < mask / 2 {
            (*known, *count) = (hash, 1);
            self.used += 1;
        }
    }
}

/// The hashes of all that a mail is from or to, each once.
pub fn people(mail: &Mail<'_>) -> Vec<u32> {
    let mut people = Vec::with_capacity(8);
    for address in mail.people() {
        let person = person(address);
        if !people.contains(&person) {
            people.push(person);
        }
    }
    people
}

/// The hash of an address.
pub fn person(address: &[u8]) -> u32 {
    hash(Place::Person, address)
}

/// Calls `read` with every word that is language, which addresses are not.
fn each_word(text: &[u8], mut read: impl FnMut(&[u8])) {
    let ends = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'<' | b'>' | b',' | b'"' | b'(' | b')');
    let mut rest = text;
    while let Some(at) = memchr(b'@', rest) {
        let start = rest[..at].iter().rposition(ends).map_or(0, |start| start + 1);
        let end = rest[at..].iter().position(ends).map_or(rest.len(), |end| at + end);
        each_word_of(&rest[..start], &mut read);
        rest = &rest[end..];
    }
    each_word_of(rest, &mut read);
}

fn each_word_of(text: &[u8], read: &mut impl FnMut(&[u8])) {
    let mut start = 0;
    while start < text.len() {
        if !is_word(text[start]) {
            start += 1;
            continue;
        }
        let length = text[start..].iter().position(|&byte| !is_word(byte)).unwrap_or(text.len() - start);
        let word = &text[start..start + length];
        start += length;
        if (2..=WORD_MAX_BYTES).contains(&length) && !word.iter().all(u8::is_ascii_digit) {
            read(word);
        }
    }
}

/// ASCII letters count the same in either case.
fn hash(place: Place, bytes: &[u8]) -> u32 {
    spread(bytes.iter().fold(place as u32, |hash, &byte| {
        (hash ^ u32::from(byte | (u8::from(byte.is_ascii_uppercase()) << 5))).wrapping_mul(0x0100_0193)
    }))
}

/// Two neighbours, in this order.
const fn pair(before: u32, after: u32) -> u32 {
    spread(before.rotate_left(7) ^ after)
}

/// Brings every bit of the hash to bear on its upper ones, of which models use some.
const fn spread(hash: u32) -> u32 {
    let hash = (hash ^ hash >> 15).wrapping_mul(0x2c1b_3c6d);
    let hash = (hash ^ hash >> 12).wrapping_mul(0x297a_2d39);
    hash ^ hash >> 15
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(mail: &str) -> Vec<(u32, u32)> {
        let mut all: Vec<_> = Features::of(&Mail::read(mail.as_bytes()).expect("a mail"), false).iter().collect();
        all.sort_unstable();
        all
    }

    /// Models are kept: a word must have the same hash for ever.
    #[test]
    fn hashes_stay() {
        assert_eq!(hash(Place::Text, b"printer"), hash(Place::Text, b"PRINTER"));
        assert_ne!(hash(Place::Text, b"printer"), hash(Place::Subject, b"printer"));
        assert_eq!(features("Subject: x\n\na1 a1 B2 77").len(), 2);
        assert!(features("Subject: x\n\na1 a1 B2 77").contains(&(hash(Place::Text, b"a1"), 2)));
        let mail = Mail::read(b"Subject: x\n\na1 a1 B2 77").expect("a mail");
        assert_eq!(Features::of(&mail, true).iter().count(), 4);
    }

    /// Whoever writes is the same person as the one that is written to, in any case of letters.
    #[test]
    fn people_are_known_by_their_addresses() {
        let mail = Mail::read(b"From: Ann <ann@x>\nTo: Bob@x, Ann@X\nCc: \"C\" <c@x>\n\n").expect("a mail");
        assert_eq!(people(&mail), [&b"ann@x"[..], b"bob@x", b"c@x"].map(person));
    }

    /// What only says how and over which list a mail came makes no difference.
    #[test]
    fn tags_and_prefixes_make_no_difference() {
        assert_eq!(features("Subject: Re: [list] no ink\n\n"), features("Subject: AW: no ink\n\n"));
    }

    /// A mail of many words is cut, not refused.
    #[test]
    fn many_words_are_cut() {
        let text: String = (0..100_000).map(|number| format!("w{number} ")).collect();
        assert!(features(&format!("Subject: x\n\n{text}")).len() <= FEATURES_MAX);
    }
}
