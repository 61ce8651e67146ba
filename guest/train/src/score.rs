//! How good guesses are.

use std::fmt::Write as _;

/// Guesses against the truth.
#[derive(Clone, Debug)]
pub struct Score {
    /// How many mails of a label (row) were guessed to be of another (column).
    confusion: Vec<Vec<usize>>,
}

impl Score {
    /// Compares guesses with the truth, both as the index of one of `labels` labels.
    pub fn of(guesses: &[usize], truth: &[usize], labels: usize) -> Score {
        let mut confusion = vec![vec![0; labels]; labels];
        for (&guess, &label) in guesses.iter().zip(truth) {
            confusion[label][guess] += 1;
        }
        Score { confusion }
    }

    /// The share of right guesses.
    pub fn accuracy(&self) -> f32 {
        let right: usize = (0..self.confusion.len()).map(|label| self.confusion[label][label]).sum();
        share(right, self.confusion.iter().flatten().sum())
    }

    /// The mean over all labels of F1, which is 2PR / (P + R).
    pub fn macro_f1(&self) -> f32 {
        let labels = self.confusion.len();
        let f1 = |label: usize| {
            let right = self.confusion[label][label];
            let of_label: usize = self.confusion[label].iter().sum();
            let guessed: usize = self.confusion.iter().map(|row| row[label]).sum();
            share(2 * right, of_label + guessed)
        };
        (0..labels).map(f1).sum::<f32>() / labels.max(1) as f32
    }

    /// The confusion matrix: a row for each label with what its mails were guessed to be.
    pub fn table(&self, labels: &[String]) -> String {
        let width = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0).max(5);
        let mut table = format!("{:width$}", "");
        for label in labels {
            let written = write!(table, " {label:>width$}");
            debug_assert!(written.is_ok());
        }
        for (label, row) in labels.iter().zip(&self.confusion) {
            let written = write!(table, "\n{label:width$}");
            debug_assert!(written.is_ok());
            for count in row {
                let written = write!(table, " {count:>width$}");
                debug_assert!(written.is_ok());
            }
        }
        table + "\n"
    }
}

/// A part of a whole; 0 of nothing.
pub fn share(part: usize, whole: usize) -> f32 {
    if whole == 0 { 0.0 } else { part as f32 / whole as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worked out by hand.
    #[test]
    fn scores_are_what_they_are_called() {
        let score = Score::of(&[0, 0, 1, 1, 1], &[0, 0, 0, 1, 1], 2);
        assert!((score.accuracy() - 0.8).abs() < 1e-6);
        assert!((score.macro_f1() - 0.8).abs() < 1e-6);
        assert_eq!(score.table(&["a".into(), "b".into()]), "          a     b\na         2     1\nb         0     2\n");
        assert!((Score::of(&[0, 0], &[0, 1], 2).macro_f1() - 1.0 / 3.0).abs() < 1e-6);
    }
}
