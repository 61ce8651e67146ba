//! A linear model that was learned from labelled mails: for each label a sum of weights, one for each feature.
//!
//! The file, all numbers little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 8 | `mailroom` |
//! | 1 | version, 2 |
//! | 1 | bits of a feature's hash that are used |
//! | 1 | number of labels |
//! | 1 | 1 if pairs of words in the text are features too, else 0 |
//! | 4 | f32: what the sums are multiplied by before they become confidence |
//! | 4 | f32: the confidence below which the model does not decide |
//! | 4 | f32: what people weigh, 0 to 1; all words together weigh the rest: the squares of both make 1 |
//! | 2 | number of people |
//! | each label: 8 | f32, f32: scale of its weights, bias |
//! | each label: 1 + n | length and text of its name |
//! | each feature: 1 + labels | rarity (0: never learned), one signed weight for each label |
//! | each person: 5 + labels | hash of the address, rising; rarity; one signed weight for each label |
//!
//! It is read where it lies: nothing is copied, so that a model in a guest's data costs an instance only the pages that
//! a mail's words touch.

use std::cmp::Ordering;

use crate::features::{Features, people};
use crate::mail::Mail;

const MAGIC: &[u8; 8] = b"mailroom";
const VERSION: u8 = 2;
/// No model is larger.
pub const MODEL_MAX_BYTES: usize = 1024 * 1024;
/// No model has more labels.
pub const LABELS_MAX: usize = 64;
/// As many bits of a hash can be used.
pub const BITS_MAX: u8 = 18;
/// No model knows more people.
pub const PEOPLE_MAX: usize = 4096;
/// Rarities are this many times what they stand for.
pub const RARITY_SCALE: f32 = 24.0;
/// No label has a longer name.
const NAME_MAX_BYTES: usize = 64;
/// A person's hash.
const HASH_BYTES: usize = 4;

/// A model in its file.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    bits: u8,
    pairs: bool,
    sharpness: f32,
    threshold: f32,
    people_share: f32,
    labels: usize,
    /// Scale and bias of each label.
    numbers: &'a [u8],
    /// The names, each after its length.
    names: &'a [u8],
    /// What each feature says.
    rows: &'a [u8],
    /// What each person says, in the order of their hashes.
    people: &'a [u8],
}

/// What goes into a model's file.
pub struct Parts<'a> {
    /// Bits of a feature's hash that are used.
    pub bits: u8,
    /// Whether pairs of words in the text are features too.
    pub pairs: bool,
    /// What sums are multiplied by before they become confidence.
    pub sharpness: f32,
    /// The confidence below which the model does not decide.
    pub threshold: f32,
    /// What people weigh.
    pub people_share: f32,
    /// Name, scale of the weights and bias of each label.
    pub labels: &'a [(String, f32, f32)],
    /// For each feature its rarity and its weight for each label.
    pub rows: &'a [u8],
    /// For each person, in the order of their hashes, the hash, its rarity and its weight for each label.
    pub people: &'a [u8],
}

/// What a model makes of a mail.
#[derive(Clone, Debug, PartialEq)]
pub struct Guess<'a> {
    /// The most likely label.
    pub label: &'a str,
    /// How likely it is, 0 to 1.
    pub confidence: f32,
}

impl<'a> Model<'a> {
    /// Reads a model; looks at all of it but the weights, any of which are possible.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(file: &'a [u8]) -> Result<Model<'a>, String> {
        let short = || "the model is cut short".to_owned();
        if file.len() > MODEL_MAX_BYTES {
            return Err(format!("the model has {} bytes, at most {MODEL_MAX_BYTES} are possible", file.len()));
        }
        let rest = file.strip_prefix(MAGIC).ok_or("this is no model: it does not begin with `mailroom`")?;
        let (head, rest) = rest.split_first_chunk::<18>().ok_or_else(short)?;
        let [version, bits, labels, pairs, numbers @ .., people_low, people_high] = *head;
        if version != VERSION {
            return Err(format!("the model is of version {version}, this program reads version {VERSION}"));
        }
        let labels = usize::from(labels);
        if !(1..=BITS_MAX).contains(&bits) || !(2..=LABELS_MAX).contains(&labels) || pairs > 1 {
            return Err(format!("a model of {bits} bits and {labels} labels is not possible"));
        }
        let [sharpness, threshold, people_share] = [0, 1, 2].map(|place| float(&numbers, place));
        let (numbers, rest) = rest.split_at_checked(8 * labels).ok_or_else(short)?;
        let mut names_length = 0;
        for _ in 0..labels {
            let length = usize::from(*rest.get(names_length).ok_or_else(short)?);
            let name = rest.get(names_length + 1..names_length + 1 + length).ok_or_else(short)?;
            if !(1..=NAME_MAX_BYTES).contains(&length) || str::from_utf8(name).is_err() {
                return Err("the model has a label without a proper name".to_owned());
            }
            names_length += 1 + length;
        }
        let (names, rest) = rest.split_at(names_length);
        let (rows, people) = rest.split_at_checked((labels + 1) << bits).ok_or_else(short)?;
        let number_of_people = usize::from(u16::from_le_bytes([people_low, people_high]));
        if number_of_people > PEOPLE_MAX || people.len() != number_of_people * (labels + HASH_BYTES + 1) {
            return Err(short());
        }
        let is_finite = (0..2 * labels).all(|at| float(numbers, at).is_finite());
        let is_share = |number| (0.0..=1.0).contains(&number);
        if !is_finite || !sharpness.is_finite() || !is_share(threshold) || !is_share(people_share) {
            return Err("the model has a number that is none".to_owned());
        }
        Ok(Model { bits, pairs: pairs == 1, sharpness, threshold, people_share, labels, numbers, names, rows, people })
    }

    /// Writes a model.
    ///
    /// # Errors
    /// These make no model.
    pub fn write(parts: &Parts<'_>) -> Result<Vec<u8>, String> {
        let Parts { bits, pairs, sharpness, threshold, people_share, labels, rows, people } = *parts;
        let number_of_people = people.len() / (labels.len() + HASH_BYTES + 1);
        let mut file = MAGIC.to_vec();
        file.extend([VERSION, bits, u8::try_from(labels.len()).unwrap_or(0), u8::from(pairs)]);
        file.extend([sharpness, threshold, people_share].iter().flat_map(|number| number.to_le_bytes()));
        file.extend(u16::try_from(number_of_people).unwrap_or(u16::MAX).to_le_bytes());
        file.extend(labels.iter().flat_map(|(_, scale, bias)| [*scale, *bias]).flat_map(f32::to_le_bytes));
        for (name, _, _) in labels {
            file.push(u8::try_from(name.len()).unwrap_or(0));
            file.extend_from_slice(name.as_bytes());
        }
        file.extend_from_slice(rows);
        file.extend_from_slice(people);
        Model::read(&file).map(drop)?;
        Ok(file)
    }

    /// The labels in their order.
    pub fn labels(&self) -> impl Iterator<Item = &'a str> {
        let mut rest = self.names;
        std::iter::from_fn(move || {
            let (&length, names) = rest.split_first()?;
            let (name, others) = names.split_at_checked(usize::from(length))?;
            rest = others;
            str::from_utf8(name).ok()
        })
    }

    /// The confidence below which this model does not decide.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// The same model with another threshold.
    #[must_use]
    pub fn with_threshold(self, threshold: f32) -> Model<'a> {
        Model { threshold, ..self }
    }

    /// The most likely label. Of equals the first.
    pub fn guess(&self, mail: &Mail<'_>) -> Guess<'a> {
        let sums = self.sums(mail);
        let (mut best, mut highest) = (0, f32::NEG_INFINITY);
        for (label, &sum) in sums[..self.labels].iter().enumerate() {
            if sum > highest {
                (best, highest) = (label, sum);
            }
        }
        let total: f32 = sums[..self.labels].iter().map(|sum| ((sum - highest) * self.sharpness).exp()).sum();
        Guess { label: self.labels().nth(best).unwrap_or_default(), confidence: 1.0 / total }
    }

    /// The sum for each label.
    fn sums(&self, mail: &Mail<'_>) -> [f32; LABELS_MAX] {
        let mut words = Sums::default();
        let width = self.labels + 1;
        for (hash, count) in Features::of(mail, self.pairs).iter() {
            let row = (hash >> (32 - u32::from(self.bits))) as usize * width;
            words.add(frequency(count), &self.rows[row..row + width]);
        }
        let mut sums = [0_f32; LABELS_MAX];
        words.weigh(&mut sums, (1.0 - self.people_share * self.people_share).sqrt());
        if !self.people.is_empty() {
            let mut known = Sums::default();
            people(mail).iter().filter_map(|&person| self.person(person)).for_each(|row| known.add(1.0, row));
            known.weigh(&mut sums, self.people_share);
        }
        for (label, sum) in sums[..self.labels].iter_mut().enumerate() {
            *sum = *sum * float(self.numbers, 2 * label) + float(self.numbers, 2 * label + 1);
        }
        sums
    }

    /// What was learned of the person with this hash: rarity and weights.
    fn person(&self, hash: u32) -> Option<&'a [u8]> {
        let width = HASH_BYTES + 1 + self.labels;
        let (mut low, mut high) = (0, self.people.len() / width);
        while low < high {
            let middle = low.midpoint(high);
            let (known, row) = self.people[middle * width..(middle + 1) * width].split_first_chunk()?;
            match u32::from_le_bytes(*known).cmp(&hash) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Some(row),
            }
        }
        None
    }
}

/// The sums of weights in the making, of features of one kind.
struct Sums {
    labels: [f32; LABELS_MAX],
    /// The sum of the squares of the features' values.
    square: f32,
}

impl Default for Sums {
    fn default() -> Sums {
        Sums { labels: [0.0; LABELS_MAX], square: 0.0 }
    }
}

impl Sums {
    /// Adds a feature by its row: rarity and weights.
    fn add(&mut self, frequency: f32, row: &[u8]) {
        let [rarity, weights @ ..] = row else { return };
        if *rarity > 0 {
            let value = frequency * f32::from(*rarity);
            self.square += value * value;
            for (sum, &weight) in self.labels.iter_mut().zip(weights) {
                *sum += value * f32::from(weight.cast_signed());
            }
        }
    }

    /// Adds these to others with this share: many features weigh as much as few.
    fn weigh(&self, sums: &mut [f32; LABELS_MAX], share: f32) {
        let factor = share / self.square.sqrt().max(1.0);
        for (sum, own) in sums.iter_mut().zip(&self.labels) {
            *sum += own * factor;
        }
    }
}

/// What it counts for that a feature occurs so often: 1 + ln.
pub fn frequency(count: u32) -> f32 {
    // A table, since logarithms may differ from machine to machine in the last digit.
    const TABLE: [f32; 16] = [
        1.0, 1.693_147, 2.098_612, 2.386_294, 2.609_438, 2.791_759, 2.945_91, 3.079_441, 3.197_225, 3.302_585,
        3.397_895, 3.484_907, 3.564_949, 3.639_057, 3.708_05, 3.772_589,
    ];
    TABLE[(count.max(1) as usize).min(TABLE.len()) - 1]
}

/// The number at this place of a row of them.
fn float(bytes: &[u8], place: usize) -> f32 {
    bytes.get(4 * place..).and_then(|rest| rest.first_chunk()).map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::person;
    use ::fuzz::{check, mutated};

    fn file() -> Vec<u8> {
        let labels = [("billing".to_owned(), 0.1, 0.0), ("support".to_owned(), 0.1, -0.1)];
        // Every other feature speaks for billing, Ann for support.
        let rows: Vec<u8> = (0..1_u32 << 4).flat_map(|row| [24, if row % 2 == 0 { 9 } else { 0 }, 3]).collect();
        let people = [&person(b"ann@x").to_le_bytes()[..], &[24, 0, 90]].concat();
        let parts = Parts {
            bits: 4,
            pairs: false,
            sharpness: 1.0,
            threshold: 0.5,
            people_share: 0.6,
            labels: &labels,
            rows: &rows,
            people: &people,
        };
        Model::write(&parts).expect("a model")
    }

    /// A model is what was written, and its sums decide.
    #[test]
    fn models_are_read_as_written() {
        let file = file();
        let model = Model::read(&file).expect("a model");
        assert_eq!(model.labels().collect::<Vec<_>>(), ["billing", "support"]);
        let mail = Mail::read(b"Subject: invoice\n\nplease pay the invoice").expect("a mail");
        let guess = model.guess(&mail);
        assert!(guess.confidence > 0.5 && guess.confidence < 1.0, "{guess:?}");
        assert_eq!(guess.label, "billing");
        for to_ann in [&b"From: Ann@x\nSubject: invoice\n\n"[..], b"To: b@x, Ann <ann@x>\nSubject: invoice\n\n"] {
            assert_eq!(model.guess(&Mail::read(to_ann).expect("a mail")).label, "support");
        }
    }

    /// What is no model is refused with the reason.
    #[test]
    fn garbage_is_refused() {
        let file = file();
        let mut newer = file.clone();
        newer[8] = 3;
        for (garbage, expected) in [
            (&b""[..], "this is no model"),
            (b"mailroom", "cut short"),
            (&file[..file.len() - 1], "cut short"),
            (&newer, "version 3"),
            (&[b"mailroom\x02\x13\x02\x00", &[0; 14][..]].concat(), "19 bits"),
            (&vec![0; MODEL_MAX_BYTES + 1], "at most"),
        ] {
            let error = Model::read(garbage).expect_err("no model");
            assert!(error.contains(expected), "{error}");
        }
    }

    /// Whatever the file: it is refused, or it decides something.
    #[test]
    fn damaged_models_do_no_harm() {
        let mail = Mail::read(b"To: ann@x\nSubject: invoice\n\nplease pay the invoice").expect("a mail");
        check("a model file", 3_000, mutated(file()), |file| {
            if let Ok(model) = Model::read(&file) {
                let guess = model.guess(&mail);
                assert!(model.labels().any(|label| label == guess.label), "{guess:?}");
            }
        });
    }
}
