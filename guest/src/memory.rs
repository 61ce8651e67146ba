//! What the triage remembers from mail to mail, shared by all instances and hosts.
//!
//! An instance forgets everything with its mail. What has to outlive it lies behind [`Memory`]: the key-value bucket
//! that the host grants, or a [`Map`] in a program that keeps it. Each call is a round trip for a host, so a mail makes
//! few of them, with several keys each.
//!
//! | key | value | written |
//! |---|---|---|
//! | `m.ID` | the issue of the mail with this Message-ID | for every mail; or by the first reply, if that comes first; by later mails that speak for its queue |
//! | `k.KEY` | the issue with this key | by the first mail that carries the key |
//! | `s.SUBJECT.PERIOD` | the issue with this subject, among these people, in this period | by the mail that opens it |
//! | `p.SERIES.PERIOD` | the issue of a numbered series of mails | by the first mail of it |
//! | `t.BAND` | the last issue that was opened with text like this | by the mail that opens it |
//! | `h.ISSUE.HOUR.N` | the `N`th follow-up of this hour | by that mail |
//!
//! What is in capitals is a number, ids and texts as 16 hexadecimal digits of their hash.

use std::collections::BTreeMap;

/// Keys and values that outlive a mail.
pub trait Memory {
    /// The values under these keys, in their order.
    ///
    /// # Errors
    /// The memory is away.
    fn get_many(&mut self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, Away>;

    /// Stores values, each in place of what is there.
    ///
    /// # Errors
    /// The memory is away; some may be stored.
    fn set_many(&mut self, entries: &[(String, Vec<u8>)]) -> Result<(), Away>;

    /// Stores `value` unless there is a value, and returns the one that is there then: of all who claim a key at the
    /// same time the same for all.
    ///
    /// # Errors
    /// The memory is away; the value may be stored.
    fn claim(&mut self, key: &str, value: &[u8]) -> Result<Vec<u8>, Away>;
}

/// Why the memory does not answer. It may later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away(pub String);

/// A memory in this program, which forgets when it is dropped.
#[derive(Clone, Debug, Default)]
pub struct Map {
    entries: BTreeMap<String, Vec<u8>>,
    /// How often it was asked.
    pub calls: usize,
}

impl Map {
    /// How many keys have a value.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Puts `garbage` in place of every value.
    #[cfg(test)]
    pub(crate) fn spoil(&mut self, garbage: &[u8]) {
        self.entries.values_mut().for_each(|value| *value = garbage.to_vec());
    }

    /// Whether it remembers nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Memory for Map {
    fn get_many(&mut self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, Away> {
        self.calls += 1;
        Ok(keys.iter().map(|key| self.entries.get(key).cloned()).collect())
    }

    fn set_many(&mut self, entries: &[(String, Vec<u8>)]) -> Result<(), Away> {
        self.calls += 1;
        self.entries.extend(entries.iter().cloned());
        Ok(())
    }

    fn claim(&mut self, key: &str, value: &[u8]) -> Result<Vec<u8>, Away> {
        self.calls += 1;
        Ok(self.entries.entry(key.to_owned()).or_insert_with(|| value.to_vec()).clone())
    }
}
