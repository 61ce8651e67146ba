//! Finding words: one pass over the text, whatever the number of words looked for.
//!
//! A word is a run of ASCII letters, digits and bytes above 127 (the letters of other alphabets); everything else
//! separates words. So "down" is found in "Down!" and not in "download". A phrase is several words with at most
//! [`GAP_MAX_BYTES`] between two of them. ASCII letters and those of Latin-1 ("Ü") match in either case.

use std::borrow::Cow;

use crate::mail::{Mail, first_bytes};
use wide::i8x64;

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
    start: u32,
    head: u32,
    length: u16,
    mark: u16,
    topic: Topic,
}

impl Entry {
    /// The entry for the bytes of `text` from `start` to its end so far.
    pub const fn new(text: &[u8], start: usize, end: usize, topic: Topic) -> Entry {
        let mut word_end = start;
        while word_end < end && is_word(text[word_end]) {
            word_end += 1;
        }
        let mut bytes = [0; HEAD_BYTES];
        let mut at = start;
        while at < word_end && at < start + HEAD_BYTES {
            bytes[at - start] = text[at];
            at += 1;
        }
        let head = head(bytes);
        let mark = mark(head, word_end - start) as u16;
        Entry { start: start as u32, head, length: (end - start) as u16, mark, topic }
    }
}

/// How many marks there are: so many that few are set, and nearly every word that begins no entry is ruled out by its own.
const MARKS: usize = 4096;

/// A bit for each mark.
type Marks = [u64; MARKS / u64::BITS as usize];

/// How many buckets there are: each has the entries of [`MARKS`]` / BUCKETS` neighbouring marks.
const BUCKETS: usize = 1024;

const _: () = assert!(MARKS.is_power_of_two() && MARKS.is_multiple_of(BUCKETS));

/// How many bytes of an entry's first word are compared before anything else.
const HEAD_BYTES: usize = 4;

/// The first bytes of a word as a number, 0 for those it does not have. Upper and lower case differ in none of the bits
/// that are left.
const fn head(bytes: [u8; HEAD_BYTES]) -> u32 {
    u32::from_le_bytes(bytes) & !0x2020_2020
}

/// The mark of the entries whose first word begins like this and has this length: Fibonacci hashing (Knuth, The Art of
/// Computer Programming, 6.4).
const fn mark(head: u32, length: usize) -> usize {
    ((head ^ length as u32).wrapping_mul(0x9e37_79b1) >> (u32::BITS - MARKS.ilog2())) as usize
}

/// The bucket of a mark.
const fn bucket(mark: usize) -> usize {
    mark / (MARKS / BUCKETS)
}

/// All words of the rules, in buckets.
///
/// The default one is made by the compiler, so that looking words up costs an instance nothing to set up. That is
/// why the words are slices of one text: the compiler cannot fill a table of things that could own memory.
#[derive(Clone, Debug)]
pub struct Lexicon {
    /// All phrases, see [`normal`], without anything between two of them.
    text: Cow<'static, [u8]>,
    /// In the order of their marks.
    entries: Cow<'static, [Entry]>,
    /// Where the entries of a bucket begin; those of bucket `b` are `starts[b]..starts[b + 1]`.
    starts: [u16; BUCKETS + 1],
    /// A bit for each mark that an entry has.
    marks: Marks,
}

impl Lexicon {
    /// The lexicon of entries that [`sort`] has put in order and that point into `text`.
    pub const fn of_sorted(text: &'static [u8], entries: &'static [Entry]) -> Lexicon {
        let (starts, marks) = (starts(entries), marks(entries));
        Lexicon { text: Cow::Borrowed(text), entries: Cow::Borrowed(entries), starts, marks }
    }

    /// The lexicon of phrases in any order, as [`normal`] makes them, none empty and at most 65,535 altogether.
    pub fn of<'a>(phrases: impl IntoIterator<Item = (&'a str, Topic)>) -> Lexicon {
        let mut text = Vec::new();
        let mut entries = Vec::new();
        for (phrase, topic) in phrases {
            let start = text.len();
            text.extend_from_slice(phrase.as_bytes());
            entries.push(Entry::new(&text, start, text.len(), topic));
        }
        entries.sort_by_key(|entry| entry.mark);
        let (starts, marks) = (starts(&entries), marks(&entries));
        Lexicon { text: Cow::Owned(text), entries: Cow::Owned(entries), starts, marks }
    }

    /// The phrases with what they speak for, in the order of the lexicon.
    pub fn entries(&self) -> impl Iterator<Item = (&[u8], Topic)> {
        self.entries.iter().map(|entry| (self.phrase(entry), entry.topic))
    }

    fn phrase(&self, entry: &Entry) -> &[u8] {
        &self.text[entry.start as usize..][..usize::from(entry.length)]
    }

    /// Calls `found` with the index of every entry that occurs in `text`, as often as it occurs.
    pub fn search(&self, text: &[u8], mut found: impl FnMut(usize)) {
        // Where the word begins in whose middle a stretch begins.
        let mut open = None;
        let mut before = 0;
        for (at, stretch) in (0..).step_by(STRETCH_BYTES).zip(text.chunks(STRETCH_BYTES)) {
            let words = words_in(stretch);
            // A bit where a word begins, and one where it has ended.
            let edges = words ^ (words << 1 | before);
            let (mut starts, mut ends) = (edges & words, edges & !words);
            before = words >> (STRETCH_BYTES - 1);
            while ends != 0 {
                let start = open.take().unwrap_or_else(|| at + take_first(&mut starts));
                self.look_up(&text[start..], at + take_first(&mut ends) - start, &mut found);
            }
            if starts != 0 {
                open = Some(at + take_first(&mut starts));
            }
        }
        if let Some(start) = open {
            self.look_up(&text[start..], text.len() - start, &mut found);
        }
    }

    /// Looks for the entries that `text` begins with, whose first word has this length.
    ///
    /// Most words end here, so this is in the loop over them, and what follows is not.
    #[inline]
    fn look_up(&self, text: &[u8], length: usize, found: &mut impl FnMut(usize)) {
        let head = head(first_bytes(text)) & u32::MAX >> (8 * HEAD_BYTES.saturating_sub(length));
        let mark = mark(head, length);
        if is_set(&self.marks, mark) {
            self.compare(text, head, bucket(mark), found);
        }
    }

    /// Looks for the entries of the bucket that `text` begins with.
    #[inline(never)]
    fn compare(&self, text: &[u8], head: u32, bucket: usize, found: &mut impl FnMut(usize)) {
        for index in usize::from(self.starts[bucket])..usize::from(self.starts[bucket + 1]) {
            let entry = &self.entries[index];
            if entry.head == head && starts_with_phrase(text, self.phrase(entry)) {
                found(index);
            }
        }
    }
}

/// The place of the lowest bit that is set, and clears it.
fn take_first(bits: &mut u64) -> usize {
    let first = bits.trailing_zeros();
    *bits &= bits.wrapping_sub(1);
    first as usize
}

/// Whether a mark is set.
fn is_set(marks: &Marks, mark: usize) -> bool {
    marks[mark / u64::BITS as usize] >> (mark % u64::BITS as usize) & 1 == 1
}

/// How many bytes are looked at together for the bounds of words.
const STRETCH_BYTES: usize = 64;

/// Which of at most [`STRETCH_BYTES`] bytes belong to words, the first in the lowest bit. As [`is_word`] says it, for all at
/// a time: byte by byte, that is a third of a triage.
fn words_in(stretch: &[u8]) -> u64 {
    let bytes = i8x64::new(first_bytes::<STRETCH_BYTES>(stretch).map(u8::cast_signed));
    let within = |bytes: i8x64, first: u8, last: u8| {
        bytes.simd_gt(i8x64::splat(first.cast_signed() - 1)) & bytes.simd_lt(i8x64::splat(last.cast_signed() + 1))
    };
    let letters = within(bytes | i8x64::splat(b'a' as i8 ^ b'A' as i8), b'a', b'z');
    // The highest bit of each decides, and that of the bytes above 127 is set.
    (letters | within(bytes, b'0', b'9') | bytes).to_bitmask()
}

/// Puts entries in the order of their marks, the earlier of two with the same mark first.
pub const fn sort<const N: usize>(mut entries: [Entry; N]) -> [Entry; N] {
    let mut sorted = 1;
    while sorted < N {
        let entry = entries[sorted];
        let mut place = sorted;
        while place > 0 && entries[place - 1].mark > entry.mark {
            entries[place] = entries[place - 1];
            place -= 1;
        }
        entries[place] = entry;
        sorted += 1;
    }
    entries
}

/// Where each bucket begins in sorted entries.
const fn starts(entries: &[Entry]) -> [u16; BUCKETS + 1] {
    assert!(entries.len() <= u16::MAX as usize);
    let mut starts = [0; BUCKETS + 1];
    let mut index = 0;
    let mut bucket = 0;
    while bucket < BUCKETS {
        starts[bucket] = index as u16;
        while index < entries.len() && self::bucket(entries[index].mark as usize) == bucket {
            index += 1;
        }
        bucket += 1;
    }
    assert!(index == entries.len(), "not sorted");
    starts[BUCKETS] = index as u16;
    starts
}

/// The marks that these entries have.
const fn marks(entries: &[Entry]) -> Marks {
    let mut marks = [0; MARKS / u64::BITS as usize];
    let mut index = 0;
    while index < entries.len() {
        let mark = entries[index].mark as usize;
        marks[mark / u64::BITS as usize] |= 1 << (mark % u64::BITS as usize);
        index += 1;
    }
    marks
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

/// Whether `text`, which begins with a word, begins with the words of `phrase`.
fn starts_with_phrase(text: &[u8], phrase: &[u8]) -> bool {
    let (mut rest, mut before) = (text, 0);
    for &wanted in phrase {
        if wanted == b' ' {
            let gap = rest.iter().take(GAP_MAX_BYTES + 1).take_while(|&&byte| !is_word(byte)).count();
            if gap == 0 || gap > GAP_MAX_BYTES {
                return false;
            }
            (rest, before) = (&rest[gap..], 0);
        } else {
            let [byte, tail @ ..] = rest else { return false };
            if lower(before, *byte) != wanted {
                return false;
            }
            (rest, before) = (tail, *byte);
        }
    }
    rest.first().is_none_or(|&byte| !is_word(byte))
}

/// The byte in lower case, given the one before it: that of ASCII, or the second one of a Latin-1 letter in UTF-8.
pub(crate) const fn lower(before: u8, byte: u8) -> u8 {
    match (before, byte) {
        (0xc3, 0x80..=0x9e) => byte | 0x20,
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

    /// Whatever stands where in a stretch.
    #[test]
    fn all_bytes_of_a_stretch_are_told_apart() {
        for first in 0..=255_u8 {
            let bytes: Vec<u8> = (0..=255).map(|byte: u8| byte.wrapping_mul(7).wrapping_add(first)).collect();
            for length in [0, 1, 15, 63, 64] {
                for stretch in bytes.windows(length.max(1)).map(|window| &window[..length]) {
                    let words = (0..length).fold(0, |words, at| words | u64::from(is_word(stretch[at])) << at);
                    assert_eq!(words_in(stretch), words, "{stretch:?}");
                }
            }
        }
    }

    /// A word may lie across stretches, fill them, or end with the text.
    #[test]
    fn words_are_found_wherever_they_stand() {
        for before in 0..3 * STRETCH_BYTES {
            for (end, count) in [("", 1), (".", 1), ("s", 0)] {
                let text = format!("{}down{end}", " ".repeat(before));
                assert_eq!(found(&["down"], &text).len(), count, "{text:?}");
            }
            let long = "x".repeat(before + 1);
            assert_eq!(found(&[&long, "yy"], &format!("{long} yy")), [long.as_str(), "yy"]);
        }
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
