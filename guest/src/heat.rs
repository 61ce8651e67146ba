//! Whether many write about one issue at the same time.
//!
//! The follow-ups of an issue take numbered slots of the hour they were written in, each by a claim, one less than it
//! takes to be hot. A mail that finds as many slots taken within an hour of its own time is hot. What it found it writes
//! into its slot: a mail that comes again finds its slot, is not counted twice and is as hot as it was.

use crate::memory::{Away, Memory};

const HOUR: u64 = 3600;

/// Whether the mail with this id, a follow-up of this issue, is at least the `enough`th within an hour.
///
/// # Errors
/// The memory is away.
pub(crate) fn is_hot(issue: u64, own: u64, time: u64, enough: u32, memory: &mut impl Memory) -> Result<bool, Away> {
    let Some(slots) = enough.checked_sub(1) else { return Ok(false) };
    let hour = time / HOUR;
    let keys: Vec<String> = [Some(hour), hour.checked_sub(1)]
        .into_iter()
        .flatten()
        .flat_map(|hour| (0..slots).map(move |slot| format!("h.{issue:016x}.{hour}.{slot}")))
        .collect();
    if keys.is_empty() {
        return Ok(true);
    }
    let answers = memory.get_many(&keys)?;
    let taken: Vec<Option<Follower>> = answers.iter().map(|answer| Follower::read(answer.as_deref()?)).collect();
    let (now, before) = taken.split_at(taken.len().min(slots as usize));
    if let Some(own) = now.iter().flatten().find(|follower| follower.mail == own) {
        return Ok(own.is_hot);
    }
    let others = now.iter().chain(before).flatten().filter(|follower| follower.time.abs_diff(time) <= HOUR).count();
    let mut others = others as u32;
    for (key, _) in keys.iter().zip(now).filter(|(_, taken)| taken.is_none()) {
        let mine = Follower { mail: own, time, is_hot: others >= slots };
        let there = Follower::read(&memory.claim(key, &mine.write())?);
        match there {
            Some(there) if there.mail != own => others += 1,
            _ => return Ok(there.is_some_and(|there| there.is_hot)),
        }
    }
    // All slots of the hour are taken.
    Ok(true)
}

/// A mail in its slot.
struct Follower {
    mail: u64,
    time: u64,
    is_hot: bool,
}

impl Follower {
    fn write(&self) -> Vec<u8> {
        format!("{:x} {} {}", self.mail, self.time, if self.is_hot { "hot" } else { "cold" }).into_bytes()
    }

    fn read(bytes: &[u8]) -> Option<Follower> {
        let mut words = str::from_utf8(bytes).ok()?.split(' ');
        let mail = u64::from_str_radix(words.next()?, 16).ok()?;
        Some(Follower { mail, time: words.next()?.parse().ok()?, is_hot: words.next()? == "hot" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Map;

    /// The fifth follow-up within an hour is hot, and those after it; none is counted twice.
    #[test]
    fn many_within_an_hour_are_hot() {
        let mut memory = Map::default();
        let mut hot = |mail, time| is_hot(1, mail, time, 5, &mut memory).expect("memory");
        let times = [7200, 7200, 7300, 7400, 7500, 7600];
        for (number, time) in (0..).zip(times) {
            for _ in 0..3 {
                assert_eq!(hot(number, time), number >= 4, "mail {number}");
            }
        }
        // It cools down, and heats up across the full hour.
        assert!(!hot(10, 3 * 3600 + 5000));
        assert!(hot(11, 3 * 3600));
    }

    /// An issue that is written about now and then stays as it is.
    #[test]
    fn few_are_not_hot() {
        let mut memory = Map::default();
        for number in 0..50 {
            assert!(!is_hot(1, number, number * 1300, 5, &mut memory).expect("memory"));
        }
        assert!(!is_hot(1, 1, 0, 0, &mut memory).expect("off"));
    }
}
