//! Which queue has an issue: what its mails say together.
//!
//! Every mail of an issue speaks for the queue that it would go to by itself, with the confidence of the model that was
//! learned, in percent. The queue with the highest sum has the issue; of equals the one that was named first. Words
//! speak only as long as nobody did. What the operator orders by a rule stays, whatever later mails say.

use crate::queue::{By, Choice, is_name};

/// More queues are not remembered: those that are named later.
const VOTES_MAX: usize = 8;
/// What a rule of the operator counts.
const ORDER: u32 = 1_000_000;

/// The sums so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Votes(Vec<(String, u32)>);

impl Votes {
    /// The sums with this mail.
    pub fn with(mut self, choice: &Choice<'_>) -> Votes {
        let points = match choice.by {
            By::Default => return self,
            By::Route => {
                self.0.clear();
                ORDER
            }
            By::Content if self.0.is_empty() => choice.confidence.max(1),
            By::Content => choice.confidence,
        };
        if let Some((_, sum)) = self.0.iter_mut().find(|(queue, _)| queue == choice.name) {
            *sum = sum.saturating_add(points);
        } else if points > 0 && self.0.len() < VOTES_MAX {
            self.0.push((choice.name.to_owned(), points));
        }
        self
    }

    /// The queue that has the issue; none if no mail said anything.
    pub fn queue(&self) -> Option<&str> {
        // Of equal maxima `max_by_key` takes the last one.
        self.0.iter().rev().max_by_key(|(_, sum)| *sum).map(|(queue, _)| queue.as_str())
    }

    /// As memory writes them down, in one word.
    pub fn write(&self) -> String {
        let votes: Vec<String> = self.0.iter().map(|(queue, sum)| format!("{queue}={sum}")).collect();
        votes.join(",")
    }

    /// What [`Votes::write`] wrote; what others wrote is passed over.
    pub fn read(text: &str) -> Votes {
        let vote = |vote: &str| {
            let (queue, sum) = vote.split_once('=')?;
            Some((queue.to_owned(), sum.parse().ok()?)).filter(|_| is_name(queue))
        };
        Votes(text.split(',').filter_map(vote).take(VOTES_MAX).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn votes(choices: &[(&str, By, u32)]) -> Votes {
        choices
            .iter()
            .fold(Votes::default(), |votes, &(name, by, confidence)| votes.with(&Choice { name, by, confidence }))
    }

    /// Many mails outweigh one, words only begin, and an order stays.
    #[test]
    fn the_queue_is_what_most_speak_for() {
        for (choices, expected) in [
            (&[][..], None),
            (&[("inbox", By::Default, 0)], None),
            (&[("a", By::Content, 60), ("b", By::Content, 60)], Some("a")),
            (&[("a", By::Content, 60), ("b", By::Content, 40), ("b", By::Content, 40)], Some("b")),
            (&[("a", By::Content, 0), ("b", By::Content, 0), ("b", By::Content, 0)], Some("a")),
            (&[("a", By::Content, 99), ("b", By::Route, 0), ("a", By::Content, 99)], Some("b")),
        ] {
            let votes = votes(choices);
            assert_eq!(votes.queue(), expected, "{choices:?}");
            assert_eq!(Votes::read(&votes.write()), votes);
        }
        assert_eq!(Votes::read("a,b=x,C=1,=2,d=3").queue(), Some("d"));
    }
}
