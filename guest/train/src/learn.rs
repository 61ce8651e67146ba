//! Learning: one linear support vector machine for each label against the others, by dual coordinate descent.
//!
//! As in liblinear (Hsieh and others, 2008), with squared hinge loss, on counts damped by a logarithm, weighed by rarity
//! and brought to length 1. Labels with few mails weigh as much as those with many. How hard the machines try, and what
//! their sums say about confidence, is found by cross-validation on blocks of time, since mails of one thread lie close
//! together. So is whether pairs of words and people are worth their time. A mail that is there under two labels tells
//! nothing about who takes it, and is left out. The same mails always give the same model.

use crate::score::Score;
use guest::features::{Features, people, person};
use guest::mail::Mail;
use guest::model::{BITS_MAX, LABELS_MAX, MODEL_MAX_BYTES, Model, PEOPLE_MAX, Parts, RARITY_SCALE, frequency};
use guest::thread::Thread;
use std::collections::{BTreeMap, BTreeSet};

/// What a mistake on a mail may cost, to choose from.
const COSTS: [f32; 5] = [0.1, 0.3, 1.0, 3.0, 10.0];
/// Parts that the mails are divided into; each is guessed by what was learned from the others.
const FOLDS: usize = 5;
/// Passes over the mails.
const PASSES_MAX: usize = 50;
/// No more bits of a hash are used even if there is room: what a mail touches of a model costs time.
const BITS_USUAL: u8 = 16;
/// What pairs of words have to add to the measure, and what people have to: both take time with every mail.
const GAIN_MIN: f32 = 0.005;
/// What people weigh against all words together, where they help: the squares of both make 1.
const PEOPLE_SHARE: f32 = 0.5;
/// The confidence below which a model leaves a mail to people: to pass on what is in a wrong queue takes them as long as to
/// sort it, so that a guess has to be little better than none.
const THRESHOLD: f32 = 0.2;
/// Room for what stands before the rows.
const HEAD_BYTES: usize = 8 * 1024;
/// No more than this for people.
const PEOPLE_MAX_BYTES: usize = 64 * 1024;

/// What was learned.
pub struct Learned {
    /// The model's file.
    pub model: Vec<u8>,
    /// The cost that was chosen.
    pub cost: f32,
    /// Whether pairs of words were found to help.
    pub pairs: bool,
    /// Whether it was found to help to know people.
    pub people: bool,
    /// How good the guesses were in cross-validation.
    pub validated: Score,
}

/// A mail as the machines see it: features and values, of length 1 at most.
type Vector = Vec<(u32, f32)>;

/// Learns to tell `labels` apart from mails in order of time, each with the index of its label. With `balanced` two
/// labels are told apart so that both do equally well (macro-F1), else so that most mails are right.
///
/// # Errors
/// There is too little to learn from.
pub fn learn(mails: &[(&[u8], usize)], labels: &[String], balanced: bool) -> Result<Learned, String> {
    if !(2..=LABELS_MAX).contains(&labels.len()) {
        return Err(format!("{} labels; a model tells 2 to {LABELS_MAX} apart", labels.len()));
    }
    let mails = &of_one_label(mails)[..];
    for (number, label) in labels.iter().enumerate() {
        if mails.iter().filter(|(_, of)| *of == number).count() < 2 * FOLDS {
            return Err(format!("label {label:?} has less than {} mails to learn from", 2 * FOLDS));
        }
    }
    let room = (MODEL_MAX_BYTES - HEAD_BYTES - PEOPLE_MAX_BYTES) / (labels.len() + 1);
    let bits = (room.ilog2() as u8).min(BITS_USUAL).min(BITS_MAX);
    let truth: Vec<usize> = mails.iter().map(|(_, label)| *label).collect();
    let [plain, paired] =
        [false, true].map(|pairs| mails.iter().map(|(data, _)| Bag::of(data, bits, pairs)).collect::<Vec<_>>());
    let mut best: Option<Attempt> = None;
    for people in [false, true] {
        for (pairs, bags) in [(false, &plain), (true, &paired)] {
            let known = best.as_ref().map(|best| (best.pairs, best.good));
            if people && known.is_some_and(|(best, _)| best != pairs) {
                continue;
            }
            for cost in COSTS {
                let mut sums = cross_validate(bags, &truth, labels.len(), bits, people, cost);
                let shift = if balanced && labels.len() == 2 { best_shift(&sums, &truth) } else { 0.0 };
                sums.iter_mut().for_each(|sums| sums[1] += shift);
                let guesses: Vec<usize> = sums.iter().map(|sums| highest(sums)).collect();
                let score = Score::of(&guesses, &truth, labels.len());
                let good = if balanced { score.macro_f1() } else { score.accuracy() };
                let enough = known.map_or(f32::NEG_INFINITY, |(_, good)| good + GAIN_MIN);
                if good > enough && best.as_ref().is_none_or(|best| good > best.good) {
                    best = Some(Attempt { good, cost, pairs, people, sums, shift, score });
                }
            }
        }
    }
    let Attempt { cost, pairs, people, sums, shift, score: validated, .. } = best.ok_or("nothing was learned")?;
    let bags = if pairs { &paired } else { &plain };
    let scale = Scale::of(&bags.iter().collect::<Vec<_>>(), bits, people, labels.len());
    let vectors: Vec<Vector> = bags.iter().map(|bag| scale.vector(bag)).collect();
    let every: Vec<usize> = (0..mails.len()).collect();
    let machines = machines(&vectors, &truth, &every, labels.len(), scale.len(), cost);

    let mut rows: Vec<Vec<u8>> = scale.rarities.iter().map(|&rarity| vec![rarity]).collect();
    rows.extend(scale.people.iter().map(|(person, rarity)| [&person.to_le_bytes()[..], &[*rarity]].concat()));
    let mut numbers = Vec::new();
    for (label, (name, weights)) in labels.iter().zip(&machines).enumerate() {
        let (&bias, weights) = weights.split_last().ok_or("nothing was learned")?;
        let largest = weights.iter().fold(f32::MIN_POSITIVE, |largest, weight| largest.max(weight.abs()));
        for (row, weight) in rows.iter_mut().zip(weights) {
            row.push(((weight / largest * 127.0).round() as i8).cast_unsigned());
        }
        let shift = if label == 1 { shift } else { 0.0 };
        numbers.push((name.clone(), largest / 127.0, bias + shift));
    }
    let (features, of_people) = rows.split_at(scale.rarities.len());
    let model = Model::write(&Parts {
        bits,
        pairs,
        sharpness: sharpness(&sums, &truth),
        threshold: THRESHOLD,
        people_share: scale.people_share(),
        labels: &numbers,
        rows: &features.concat(),
        people: &of_people.concat(),
    })?;
    Ok(Learned { model, cost, pairs, people, validated })
}

/// The mails without those that are there under several labels: they do not tell these apart.
fn of_one_label<'a>(mails: &[(&'a [u8], usize)]) -> Vec<(&'a [u8], usize)> {
    let id = |data: &[u8]| Mail::read(data).map_or(0, |mail| Thread::read(&mail).own);
    let ids: Vec<u64> = mails.iter().map(|(data, _)| id(data)).collect();
    let mut labels: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
    for (id, (_, label)) in ids.iter().zip(mails) {
        labels.entry(*id).or_default().insert(*label);
    }
    mails.iter().zip(&ids).filter(|(_, id)| labels[*id].len() == 1).map(|(mail, _)| *mail).collect()
}

/// What came of one way to learn.
struct Attempt {
    good: f32,
    cost: f32,
    pairs: bool,
    people: bool,
    sums: Vec<Vec<f32>>,
    shift: f32,
    score: Score,
}

/// What a mail has to learn from.
#[derive(Default)]
struct Bag {
    /// Counted features, by the bits of their hashes that are used.
    words: Vec<(u32, f32)>,
    sender: Option<u32>,
    people: Vec<u32>,
}

impl Bag {
    fn of(data: &[u8], bits: u8, pairs: bool) -> Bag {
        let Ok(mail) = Mail::read(data) else { return Bag::default() };
        let mut words: Vec<(u32, f32)> = Features::of(&mail, pairs)
            .iter()
            .map(|(hash, count)| (hash >> (32 - u32::from(bits)), frequency(count)))
            .collect();
        words.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        Bag { words, sender: mail.sender().map(person), people: people(&mail) }
    }
}

/// How much features say by being rare, in steps.
struct Scale {
    /// Of the bits of a hash; 0 for what fewer than two mails have.
    rarities: Vec<u8>,
    /// Of people who wrote, in the order of their hashes. Mailboxes and lists do not write.
    people: Vec<(u32, u8)>,
}

impl Scale {
    fn of(bags: &[&Bag], bits: u8, with_people: bool, labels: usize) -> Scale {
        let rarity = |mails: u32| {
            let rarity = ((1.0 + bags.len() as f32) / (1.0 + mails as f32)).ln() + 1.0;
            if mails < 2 { 0 } else { (rarity * RARITY_SCALE).round() as u8 }
        };
        let mut mails = vec![0_u32; 1 << bits];
        for bag in bags {
            let mut last = None;
            for &(feature, _) in &bag.words {
                if last.replace(feature) != Some(feature) {
                    mails[feature as usize] += 1;
                }
            }
        }
        let writers: BTreeSet<u32> = bags.iter().filter_map(|bag| bag.sender).filter(|_| with_people).collect();
        let mut known: BTreeMap<u32, u32> = BTreeMap::new();
        for person in bags.iter().flat_map(|bag| &bag.people).filter(|person| writers.contains(person)) {
            *known.entry(*person).or_default() += 1;
        }
        let mut people: Vec<(u32, u32)> = known.into_iter().filter(|&(_, mails)| mails >= 2).collect();
        people.sort_by_key(|&(_, mails)| std::cmp::Reverse(mails));
        people.truncate(PEOPLE_MAX.min(PEOPLE_MAX_BYTES / (labels + 5)));
        people.sort_unstable();
        Scale {
            rarities: mails.iter().map(|&mails| rarity(mails)).collect(),
            people: people.into_iter().map(|(person, mails)| (person, rarity(mails))).collect(),
        }
    }

    /// How many features there are, people too.
    fn len(&self) -> usize {
        self.rarities.len() + self.people.len()
    }

    fn people_share(&self) -> f32 {
        if self.people.is_empty() { 0.0 } else { PEOPLE_SHARE }
    }

    fn vector(&self, bag: &Bag) -> Vector {
        let share = self.people_share();
        let words = bag.words.iter();
        let words =
            words.map(|&(feature, frequency)| (feature, frequency * f32::from(self.rarities[feature as usize])));
        let people = bag.people.iter().filter_map(|person| {
            let place = self.people.binary_search_by_key(person, |&(known, _)| known).ok()?;
            Some(((self.rarities.len() + place) as u32, f32::from(self.people[place].1)))
        });
        let mut vector = of_length(words.filter(|&(_, value)| value > 0.0).collect(), (1.0 - share * share).sqrt());
        vector.extend(of_length(people.collect(), share));
        vector
    }
}

/// The vector with this length, but nothing smaller than 1 becomes larger.
fn of_length(mut vector: Vector, length: f32) -> Vector {
    let factor = length / vector.iter().map(|(_, value)| value * value).sum::<f32>().sqrt().max(1.0);
    vector.iter_mut().for_each(|(_, value)| *value *= factor);
    vector
}

/// What each mail's sums are when its own block of time is not learned from.
fn cross_validate(bags: &[Bag], truth: &[usize], labels: usize, bits: u8, people: bool, cost: f32) -> Vec<Vec<f32>> {
    // The blocks of each label for itself, so that every block has all labels.
    let mut seen = vec![0; labels];
    let total: Vec<usize> = (0..labels).map(|label| truth.iter().filter(|&&of| of == label).count()).collect();
    let fold: Vec<usize> = truth
        .iter()
        .map(|&label| {
            seen[label] += 1;
            (seen[label] - 1) * FOLDS / total[label]
        })
        .collect();
    let mut sums = vec![Vec::new(); bags.len()];
    for number in 0..FOLDS {
        let learned: Vec<usize> = (0..bags.len()).filter(|&mail| fold[mail] != number).collect();
        let scale = Scale::of(&learned.iter().map(|&mail| &bags[mail]).collect::<Vec<_>>(), bits, people, labels);
        let vectors: Vec<Vector> = bags.iter().map(|bag| scale.vector(bag)).collect();
        let machines = machines(&vectors, truth, &learned, labels, scale.len(), cost);
        for mail in (0..bags.len()).filter(|&mail| fold[mail] == number) {
            sums[mail] = machines.iter().map(|weights| sum(weights, &vectors[mail])).collect();
        }
    }
    sums
}

/// One machine for each label: its weights, and behind them its bias.
fn machines(
    vectors: &[Vector],
    truth: &[usize],
    learned: &[usize],
    labels: usize,
    features: usize,
    cost: f32,
) -> Vec<Vec<f32>> {
    let count = |label: usize| learned.iter().filter(|&&mail| truth[mail] == label).count().max(1) as f32;
    let share: Vec<f32> = (0..labels).map(|label| learned.len() as f32 / (labels as f32 * count(label))).collect();
    (0..labels)
        .map(|label| {
            let side = |mail: usize| if truth[mail] == label { 1.0 } else { -1.0 };
            let examples: Vec<Example<'_>> = learned
                .iter()
                .map(|&mail| Example { vector: &vectors[mail], side: side(mail), cost: cost * share[truth[mail]] })
                .collect();
            machine(&examples, features)
        })
        .collect()
}

struct Example<'a> {
    vector: &'a Vector,
    /// 1 for what is to be recognised, -1 for all else.
    side: f32,
    cost: f32,
}

fn machine(examples: &[Example<'_>], features: usize) -> Vec<f32> {
    let mut weights = vec![0_f32; features + 1];
    let mut pulls = vec![0_f32; examples.len()];
    let mut order: Vec<usize> = (0..examples.len()).collect();
    let mut state = 1_u64;
    let mut random = |below: usize| {
        // A linear congruential generator with Knuth's constants: the same order in every run.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..PASSES_MAX {
        for last in (1..order.len()).rev() {
            order.swap(last, random(last + 1));
        }
        let mut largest = 0_f32;
        for &number in &order {
            let Example { vector, side, cost } = &examples[number];
            let slack = 0.5 / cost;
            let gradient = side * sum(&weights, vector) - 1.0 + slack * pulls[number];
            let projected = if pulls[number] > 0.0 { gradient } else { gradient.min(0.0) };
            largest = largest.max(projected.abs());
            if projected != 0.0 {
                // Vectors have length 1 at most, and the bias has length 1.
                let pull = (pulls[number] - gradient / (2.0 + slack)).max(0.0);
                let step = (pull - pulls[number]) * side;
                pulls[number] = pull;
                for &(feature, value) in *vector {
                    weights[feature as usize] += step * value;
                }
                weights[features] += step;
            }
        }
        if largest < 0.01 {
            break;
        }
    }
    weights
}

fn sum(weights: &[f32], vector: &Vector) -> f32 {
    let bias = weights[weights.len() - 1];
    vector.iter().map(|&(feature, value)| weights[feature as usize] * value).sum::<f32>() + bias
}

fn highest(sums: &[f32]) -> usize {
    (0..sums.len()).rev().max_by(|&a, &b| sums[a].total_cmp(&sums[b])).unwrap_or(0)
}

/// What to add to the second of two sums for the best macro-F1.
fn best_shift(sums: &[Vec<f32>], truth: &[usize]) -> f32 {
    let mut gaps: Vec<f32> = sums.iter().map(|sums| sums[0] - sums[1]).collect();
    gaps.sort_by(f32::total_cmp);
    let f1 = |shift: f32| {
        let guesses: Vec<usize> = sums.iter().map(|sums| usize::from(sums[1] + shift > sums[0])).collect();
        Score::of(&guesses, truth, 2).macro_f1()
    };
    // Between two mails each; the mean of all that do best, which a single mail moves least.
    let shifts: Vec<(f32, f32)> =
        gaps.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).map(|at| (at, f1(at))).collect();
    let best = shifts.iter().fold(f1(0.0), |best, (_, f1)| best.max(*f1));
    let good: Vec<f32> = shifts.iter().filter(|(_, f1)| *f1 >= best).map(|(shift, _)| *shift).collect();
    if good.is_empty() { 0.0 } else { good.iter().sum::<f32>() / good.len() as f32 }
}

/// What to multiply sums by so that their softmax is the share of right guesses: the best likelihood.
fn sharpness(sums: &[Vec<f32>], truth: &[usize]) -> f32 {
    let loss = |sharpness: f32| -> f32 {
        let of = |(sums, &label): (&Vec<f32>, &usize)| {
            let highest = sums.iter().fold(f32::NEG_INFINITY, |highest, &sum| highest.max(sum));
            let total: f32 = sums.iter().map(|sum| ((sum - highest) * sharpness).exp()).sum();
            total.ln() - (sums[label] - highest) * sharpness
        };
        sums.iter().zip(truth).map(of).sum()
    };
    let tried = (0..60).map(|step| 0.25 * 1.08_f32.powi(step));
    tried.min_by(|&a, &b| loss(a).total_cmp(&loss(b))).unwrap_or(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mails() -> (Vec<(Vec<u8>, usize)>, Vec<String>) {
        let topics = [("billing", ["invoice", "refund", "payment"]), ("support", ["crash", "password", "install"])];
        let mail = |number: usize| {
            let words = topics[number % 2].1;
            let (word, other) = (words[number / 2 % 3], words[(number / 2 + 1) % 3]);
            (format!("Subject: the {word} {number}\n\nabout my {other} and the weather").into_bytes(), number % 2)
        };
        ((0..60).map(mail).collect(), topics.iter().map(|(name, _)| (*name).to_owned()).collect())
    }

    /// What is easy is learned, and the same mails give the same model.
    #[test]
    fn words_that_tell_labels_apart_are_learned() {
        let (mails, labels) = mails();
        let examples: Vec<(&[u8], usize)> = mails.iter().map(|(data, label)| (&data[..], *label)).collect();
        let learned = learn(&examples, &labels, false).expect("a model");
        assert_eq!(learned.validated.accuracy(), 1.0);
        assert_eq!(learned.model, learn(&examples, &labels, false).expect("a model").model);
        let model = Model::read(&learned.model).expect("a model");
        let guess = |mail: &str| {
            let mail = Mail::read(mail.as_bytes()).expect("a mail");
            let guess = model.guess(&mail);
            (guess.label.to_owned(), guess.confidence > model.threshold())
        };
        assert_eq!(guess("Subject: a refund\n\nplease"), ("billing".to_owned(), true));
        assert_eq!(guess("Subject: it crashed\n\nwith a crash"), ("support".to_owned(), true));
    }

    /// Who wrote before is known again as an addressee, where words do not tell. A mailbox that never writes is not.
    #[test]
    fn people_who_write_are_known() {
        let mail = |number: usize| {
            let (team, person) = (number % 2, format!("p{}{}@y", number % 2, number / 2 % 3));
            let people = match number / 6 % 3 {
                0 => format!("From: {person}\n"),
                _ => format!("From: new{number}@z\nCc: {person}\n"),
            };
            let head = format!("Message-ID: <{number}@x>\nTo: box{team}@x\n{people}");
            (format!("{head}Subject: hello\n\nthe same in all mails").into_bytes(), team)
        };
        let mails: Vec<(Vec<u8>, usize)> = (0..60).map(mail).collect();
        let examples: Vec<(&[u8], usize)> = mails.iter().map(|(data, label)| (&data[..], *label)).collect();
        let labels = ["t0", "t1"].map(str::to_owned);
        let learned = learn(&examples, &labels, false).expect("a model");
        let model = Model::read(&learned.model).expect("a model");
        let guess = |mail: &str| model.guess(&Mail::read(mail.as_bytes()).expect("a mail"));
        let rest = "From: new@z\nSubject: hello\n\nthe same in all mails";
        assert_eq!(guess(&format!("Cc: p01@y\n{rest}")).label, "t0");
        assert_eq!(guess(&format!("Cc: p11@y\n{rest}")).label, "t1");
        assert_eq!(guess(&format!("To: box0@x\n{rest}")), guess(&format!("To: box1@x\n{rest}")));
    }

    /// A mail that two labels have does not change what is learned.
    #[test]
    fn mails_of_two_labels_are_left_out() {
        let (mut mails, labels) = mails();
        let learned = |mails: &[(Vec<u8>, usize)]| {
            let examples: Vec<(&[u8], usize)> = mails.iter().map(|(data, label)| (&data[..], *label)).collect();
            learn(&examples, &labels, false).expect("a model").model
        };
        let without = learned(&mails);
        mails.extend([0, 1].map(|label| (b"Message-ID: <1@x>\nSubject: invoice\n\ncrash".to_vec(), label)));
        assert!(learned(&mails) == without);
    }

    /// Too little to learn from is said.
    #[test]
    fn too_few_mails_are_refused() {
        let (mails, labels) = mails();
        let examples: Vec<(&[u8], usize)> = mails[..12].iter().map(|(data, label)| (&data[..], *label)).collect();
        assert!(
            learn(&examples, &labels, false).err().is_some_and(|error| error.contains("\"billing\" has less than 10"))
        );
        assert!(learn(&examples, &labels[..1], false).is_err());
    }
}
