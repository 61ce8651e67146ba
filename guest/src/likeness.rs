//! Which texts are nearly the same: an alert with another time in it, a mail sent twice, a report that many forward.
//!
//! A text is taken as the set of all its runs of [`SHINGLE_WORDS`] words, without numbers. Each run is hashed, each
//! hash falls into one of [`BINS`] bins, and of each bin only the smallest stays: MinHash with one permutation. Two
//! texts agree in about as many bins as they have runs in common. Four bins together make a band; texts that are nearly
//! the same have a band in common with near certainty, and a band is a key that memory can be asked for.

use crate::mail::Mail;
use crate::words::is_word;

const SHINGLE_WORDS: usize = 3;
const BINS: usize = 16;
/// Bins that have to agree.
const ALIKE_MIN: usize = 13;
/// A text with fewer runs says too little.
const SHINGLES_MIN: usize = 24;
/// At most this much of a text is read.
const TEXT_MAX_BYTES: usize = 16 * 1024;

/// What is left of a text to compare it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sketch {
    bins: [u16; BINS],
}

impl Sketch {
    /// The sketch of what the sender wrote anew; none if that is too short to tell.
    pub fn of(mail: &Mail<'_>) -> Option<Sketch> {
        let mut bins = [u64::MAX; BINS];
        let (mut shingles, mut read) = (0, 0);
        let mut last = [0_u64; SHINGLE_WORDS];
        let mut words = 0;
        mail.new_text(|text| {
            let text = &text[..text.len().min(TEXT_MAX_BYTES - read)];
            read += text.len();
            for word in text.split(|&byte| !is_word(byte)).filter(|word| !word.is_empty()) {
                if word.iter().any(u8::is_ascii_digit) {
                    continue;
                }
                let hash = word.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                    (hash ^ u64::from(byte.to_ascii_lowercase())).wrapping_mul(0x0000_0100_0000_01b3)
                });
                last = [last[1], last[2], hash];
                words += 1;
                if words >= SHINGLE_WORDS {
                    let run = last.iter().fold(0_u64, |run, &word| mix(run.rotate_left(23) ^ word));
                    let bin = &mut bins[(run >> 60) as usize];
                    *bin = (*bin).min(run << 4);
                    shingles += 1;
                }
            }
        });
        // With enough runs an empty bin is rare; then the text repeats itself.
        (shingles >= SHINGLES_MIN && bins.iter().filter(|&&bin| bin == u64::MAX).count() <= BINS - ALIKE_MIN)
            .then(|| Sketch { bins: bins.map(|bin| mix(bin) as u16) })
    }

    /// The keys of its bands.
    pub fn bands(&self) -> [u64; 4] {
        let mut bands = [0; 4];
        for (number, (band, bins)) in bands.iter_mut().zip(self.bins.chunks(4)).enumerate() {
            *band = bins.iter().fold(number as u64, |band, &bin| band << 16 ^ band >> 48 ^ u64::from(bin));
            *band = mix(*band ^ (number as u64) << 61);
        }
        bands
    }

    /// Whether both are of nearly the same text.
    pub fn is_like(&self, other: &Sketch) -> bool {
        self.bins.iter().zip(&other.bins).filter(|(one, other)| one == other).count() >= ALIKE_MIN
    }

    /// As text, to be remembered.
    pub fn to_hex(self) -> String {
        self.bins.iter().map(|bin| format!("{bin:04x}")).collect()
    }

    /// What [`Sketch::to_hex`] wrote.
    pub fn from_hex(hex: &str) -> Option<Sketch> {
        let mut bins = [0; BINS];
        if hex.len() != BINS * 4 || !hex.is_ascii() {
            return None;
        }
        for (bin, at) in bins.iter_mut().zip((0..).step_by(4)) {
            *bin = u16::from_str_radix(&hex[at..at + 4], 16).ok()?;
        }
        Some(Sketch { bins })
    }
}

/// Spreads the bits of a number over all of it (the finaliser of splitmix64).
pub(crate) const fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "The backup of the file server did not finish. The job was cancelled after it had waited for the \
        tape library, which reports that its door is open. Please close the door and start the job again, or tell \
        the night shift to do it. The last complete backup is the one of Sunday, kept in the second drawer.";

    fn sketch(text: &str) -> Option<Sketch> {
        let mail = format!("Subject: a\n\n{text}");
        Sketch::of(&Mail::read(mail.as_bytes()).expect("a mail"))
    }

    /// Other times and numbers, another greeting: the same text. Another text of the same length: not.
    #[test]
    fn nearly_the_same_is_recognised() {
        let one = sketch(&format!("Job 4711 at 02:10\n{TEXT}")).expect("a sketch");
        let other = sketch(&format!("Job 4712 at 03:10\n{TEXT}\n> quoted")).expect("a sketch");
        assert!(one.is_like(&other));
        assert!(one.bands().iter().zip(other.bands()).any(|(one, other)| *one == other));
        let different: Vec<&str> = TEXT.split(' ').rev().collect();
        assert!(!one.is_like(&sketch(&different.join(" ")).expect("a sketch")));
    }

    /// Two mails that say "thanks" are not about the same.
    #[test]
    fn short_texts_have_no_sketch() {
        assert_eq!(sketch("Thank you very much for the quick answer!"), None);
        assert_eq!(sketch(""), None);
    }

    /// What is remembered is what was there, and garbage is nothing.
    #[test]
    fn sketches_survive_being_written_down() {
        let one = sketch(TEXT).expect("a sketch");
        assert_eq!(Sketch::from_hex(&one.to_hex()), Some(one));
        for garbage in ["", "00", &"ä".repeat(32), &"g".repeat(64)] {
            assert_eq!(Sketch::from_hex(garbage), None);
        }
    }
}
