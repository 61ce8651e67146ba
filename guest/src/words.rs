//! Finding words: one pass over the text, whatever the number of words looked for.
//!
//! A word is a run of ASCII letters, digits and bytes above 127 (the letters of other alphabets); everything else
//! separates words. So "down" is found in "Down!" and not in "download". A phrase is several words with at most
//! [`GAP_MAX_BYTES`] between two of them. ASCII letters and those of Latin-1 ("Ü") match in either case.

use std::borrow::Cow;

use crate::mail::Mail;

/// What may stand between two words of a phrase, in bytes: a space, a hyphen, a line end with indentation.
pub const GAP_MAX_BYTES: usize = 3;
/// At most this many different findings are noted for a mail.
pub const FINDINGS_MAX: usize = 64;

/// What a word speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Speaks for priority `urgent`.
    Urgent,
    /// Speaks for priority `high`.
    High,
    /// Speaks for priority `low`.
    Low,
    /// Speaks for the queue with this index in [`crate::Rules`].
    Queue(u8),
}

/// A word or phrase to look for, as its place in the text of the lexicon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it begins.
    pub start: u32,
    /// Its length in bytes.
    pub length: u16,
    /// What it speaks for.
    pub topic: Topic,
}

/// All words of the rules, arranged by their first byte.
///
/// The default one is made by the compiler, so that looking words up costs an instance nothing to set up. That is
/// why the words are slices of one text: the compiler cannot fill a table of things that could own memory.
#[derive(Clone, Debug)]
pub struct Lexicon {
    /// All phrases, in lower case, their words separated by single spaces, without anything between two phrases.
    text: Cow<'static, [u8]>,
    entries: Cow<'static, [Entry]>,
    /// Where the entries of a first byte begin; those of byte `b` are `starts[b]..starts[b + 1]`.
    starts: [u16; 257],
    /// For each first byte the set of lengths that a first word has; bit 31 stands for 31 and more. It turns away
    /// nearly every word of an ordinary text without looking at an entry.
    lengths: [u32; 256],
}

impl Lexicon {
    /// Arranges entries that are sorted by the first byte of their phrase and point into `text`.
    pub const fn of_sorted(text: &'static [u8], entries: &'static [Entry]) -> Lexicon {
        let (starts, lengths) = arrange(text, entries);
        Lexicon { text: Cow::Borrowed(text), entries: Cow::Borrowed(entries), starts, lengths }
    }

    /// Arranges words in any order, none of them empty and at most 65,535 of them.
    pub fn of<'a>(words: impl IntoIterator<Item = (&'a str, Topic)>) -> Lexicon {
        let mut text = Vec::new();
        let mut entries = Vec::new();
        for (phrase, topic) in words {
            entries.push(Entry { start: text.len() as u32, length: phrase.len() as u16, topic });
            text.extend_from_slice(phrase.as_bytes());
        }
        entries.sort_by_key(|entry| text[entry.start as usize]);
        let (starts, lengths) = arrange(&text, &entries);
        Lexicon { text: Cow::Owned(text), entries: Cow::Owned(entries), starts, lengths }
    }

    /// The phrases with what they speak for, in the order of their first bytes.
    pub fn entries(&self) -> impl Iterator<Item = (&[u8], Topic)> {
        self.entries.iter().map(|entry| (self.phrase(entry), entry.topic))
    }

    fn phrase(&self, entry: &Entry) -> &[u8] {
        &self.text[entry.start as usize..][..usize::from(entry.length)]
    }

    /// Calls `found` with the index of every entry that occurs in `text`, as often as it occurs.
    pub fn search(&self, text: &[u8], mut found: impl FnMut(usize)) {
        let mut rest = text;
        loop {
            let Some(start) = rest.iter().position(|&byte| is_word(byte)) else { return };
            rest = &rest[start..];
            let length = rest.iter().position(|&byte| !is_word(byte)).unwrap_or(rest.len());
            let first = rest[0].to_ascii_lowercase() as usize;
            if self.lengths[first] & length_bit(length) != 0 {
                let candidates = usize::from(self.starts[first])..usize::from(self.starts[first + 1]);
                for index in candidates {
                    if starts_with_phrase(rest, self.phrase(&self.entries[index])) {
                        found(index);
                    }
                }
            }
            rest = &rest[length..];
        }
    }
}

/// Whether a byte belongs to a word.
pub const fn is_word(byte: u8) -> bool {
    static WORD: [bool; 256] = {
        let mut word = [false; 256];
        let mut byte = 0;
        while byte < 256 {
            word[byte] = byte >= 128 || (byte as u8).is_ascii_alphanumeric();
            byte += 1;
        }
        word
    };
    WORD[byte as usize]
}

const fn length_bit(length: usize) -> u32 {
    1 << if length < 31 { length } else { 31 }
}

/// The starts and lengths of a [`Lexicon`].
const fn arrange(text: &[u8], entries: &[Entry]) -> ([u16; 257], [u32; 256]) {
    assert!(entries.len() <= u16::MAX as usize);
    let mut starts = [0; 257];
    let mut lengths = [0; 256];
    let mut index = 0;
    let mut byte = 0;
    while byte < 256 {
        starts[byte] = index as u16;
        while index < entries.len() && text[entries[index].start as usize] as usize == byte {
            let Entry { start, length, .. } = entries[index];
            let mut word = 0;
            while word < length as usize && text[start as usize + word] != b' ' {
                word += 1;
            }
            lengths[byte] |= length_bit(word);
            index += 1;
        }
        byte += 1;
    }
    assert!(index == entries.len(), "not sorted by the first byte");
    starts[256] = index as u16;
    (starts, lengths)
}

/// Whether `text`, which begins with a word, begins with the words of `phrase`.
fn starts_with_phrase(text: &[u8], phrase: &[u8]) -> bool {
    let mut at = 0;
    for &wanted in phrase {
        if wanted == b' ' {
            let gap = text[at..].iter().take(GAP_MAX_BYTES + 1).take_while(|&&byte| !is_word(byte)).count();
            if gap == 0 || gap > GAP_MAX_BYTES {
                return false;
            }
            at += gap;
        } else {
            match text.get(at) {
                Some(&byte) if lower(text[..at].last(), byte) == wanted => at += 1,
                _ => return false,
            }
        }
    }
    text.get(at).is_none_or(|&byte| !is_word(byte))
}

/// The byte in lower case, given the one before it: that of ASCII, or the second one of a Latin-1 letter in UTF-8.
const fn lower(before: Option<&u8>, byte: u8) -> u8 {
    match (before, byte) {
        (Some(0xc3), 0x80..=0x9e) => byte | 0x20,
        _ => byte.to_ascii_lowercase(),
    }
}

/// A word or phrase as a lexicon wants it: lower case, single spaces, nothing else between words.
pub fn normal(phrase: &str) -> String {
    let words = phrase.split(|c: char| c.is_ascii() && !is_word(c as u8)).filter(|word| !word.is_empty());
    let normal = words.collect::<Vec<_>>().join(" ");
    let letters = normal.chars().map(|c| match c {
        'A'..='Z' | '\u{c0}'..='\u{de}' => char::from(c as u8 | 0x20),
        _ => c,
    });
    letters.collect()
}

/// Where in the mail something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the subject.
    Subject,
    /// In the part before the `@` of an addressee.
    Addressee,
    /// In what the sender wrote anew, not in what is quoted.
    Body,
}

/// Which entries occur in a mail, and where; each counts once for each place.
pub struct Findings {
    list: Vec<(u16, Place)>,
}

impl Findings {
    /// Searches a whole mail.
    pub fn search(mail: &Mail<'_>, lexicon: &Lexicon) -> Findings {
        let mut list: Vec<(u16, Place)> = Vec::with_capacity(FINDINGS_MAX);
        let mut note = |index: usize, place| {
            let finding = (index as u16, place);
            if list.len() < FINDINGS_MAX && !list.contains(&finding) {
                list.push(finding);
            }
        };
        lexicon.search(&mail.subject, |index| note(index, Place::Subject));
        for mailbox in mail.addressees() {
            lexicon.search(mailbox, |index| note(index, Place::Addressee));
        }
        mail.new_text(|text| lexicon.search(text, |index| note(index, Place::Body)));
        Findings { list }
    }

    /// The findings in the order found: subject, addressees, body.
    pub fn iter<'a>(&'a self, lexicon: &'a Lexicon) -> impl Iterator<Item = Finding<'a>> {
        self.list.iter().map(|&(index, place)| {
            let entry = &lexicon.entries[usize::from(index)];
            Finding { phrase: lexicon.phrase(entry), topic: entry.topic, place }
        })
    }
}

/// An entry that occurs in a mail.
pub struct Finding<'a> {
    /// The word or phrase, as the rules have it.
    pub phrase: &'a [u8],
    /// What it speaks for.
    pub topic: Topic,
    /// Where it was found.
    pub place: Place,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &[&str], text: &str) -> Vec<String> {
        let lexicon = Lexicon::of(words.iter().map(|word| (*word, Topic::High)));
        let mut list = Vec::new();
        lexicon.search(text.as_bytes(), |index| {
            list.push(String::from_utf8_lossy(lexicon.phrase(&lexicon.entries[index])).into_owned());
        });
        list
    }

    /// "download" is not "down".
    #[test]
    fn words_are_found_whole() {
        assert_eq!(found(&["down"], "Download the countdown. DOWN!"), ["down"]);
        assert_eq!(found(&["down"], "(down)"), ["down"]);
        assert_eq!(found(&["down"], "dow"), [""; 0]);
        assert_eq!(found(&["störung"], "Eine Störung, keine Betriebsstörung, STÖRUNG"), ["störung", "störung"]);
        assert_eq!(found(&[&normal("ÜBER alles")], "Über-Alles \u{c2}"), ["über alles"]);
    }

    /// A phrase may be wrapped at the line end or hyphenated, but is not put together from afar.
    #[test]
    fn phrases_bridge_a_short_gap() {
        assert_eq!(found(&["does not work"], "It does\r\n not\nwork"), ["does not work"]);
        assert_eq!(found(&["sign in"], "sign-in, signin, sign, in, sign .... in"), ["sign in", "sign in"]);
        assert_eq!(found(&["no reply"], "no"), [""; 0]);
        assert_eq!(found(&["no reply"], "no replys"), [""; 0]);
    }

    /// A very long word is looked up like any other.
    #[test]
    fn long_words_are_found() {
        let long = "a".repeat(40);
        assert_eq!(found(&[&long], &format!("aa {long} aa")), [long.as_str()]);
    }
}
