//! `wasi:config/store`: what the operator passed, read-only and the same for every message.

use super::State;
use crate::interface::wasi::config::store::{Error, Host};
use anyhow::{Result, bail};
use std::sync::Arc;

/// Largest configuration in bytes, keys and values together: every message that asks gets a copy.
const MAX_BYTES: usize = 64 << 10;

/// The pairs that a guest reads through `wasi:config/store`, in the order of their keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration(Arc<[(String, String)]>);

impl Configuration {
    /// Takes `KEY=VALUE` pairs; of a repeated key the last one counts.
    ///
    /// # Errors
    /// A pair without a key or without `=`, or more than 64 KiB in all.
    pub fn parse<S: AsRef<str>>(pairs: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut sorted = std::collections::BTreeMap::new();
        for pair in pairs {
            match pair.as_ref().split_once('=') {
                Some((key, value)) if !key.is_empty() => sorted.insert(key.to_string(), value.to_string()),
                _ => bail!("--config {:?} is not of the form KEY=VALUE", pair.as_ref()),
            };
        }
        let bytes: usize = sorted.iter().map(|(key, value)| key.len() + value.len()).sum();
        if bytes > MAX_BYTES {
            bail!("--config: {bytes} bytes in all; at most {MAX_BYTES}");
        }
        Ok(Self(sorted.into_iter().collect()))
    }

    /// The pairs.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }
}

impl Host for State {
    fn get(&mut self, key: String) -> Result<Option<String>, Error> {
        let pairs = &self.configuration.0;
        Ok(pairs.binary_search_by(|(name, _)| name.cmp(&key)).ok().map(|at| pairs[at].1.clone()))
    }

    fn get_all(&mut self) -> Result<Vec<(String, String)>, Error> {
        Ok(self.configuration.0.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_key_counts() -> Result<()> {
        let configuration = Configuration::parse(["b=1", "a=x=y", "b=2", "c="])?;
        let mut state = State::new(configuration, 0);
        assert_eq!(state.get("a".into()).expect("found"), Some("x=y".into()));
        assert_eq!(state.get("b".into()).expect("found"), Some("2".into()));
        assert_eq!(state.get("c".into()).expect("found"), Some(String::new()));
        assert_eq!(state.get("d".into()).expect("looked up"), None);
        assert_eq!(state.get_all().expect("listed").len(), 3);
        Ok(())
    }

    #[test]
    fn what_is_no_pair_is_named() {
        for pair in ["", "key", "=value"] {
            let error = Configuration::parse([pair]).expect_err(pair).to_string();
            assert!(error.contains("KEY=VALUE"), "{error}");
        }
        assert!(Configuration::parse([format!("k={}", "v".repeat(MAX_BYTES))]).is_err());
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use ::fuzz::{check, collection};

    /// Whatever is given with `--config` is refused or there: sorted, each key once, with its last value.
    #[test]
    fn any_configuration_is_taken_whole_or_refused() {
        check("a configuration", 4_000, collection::vec("[a-c=]{0,4}|\\PC{0,12}=\\PC{0,12}", 0..8), |pairs| {
            let split: Option<Vec<_>> =
                pairs.iter().map(|pair| pair.split_once('=').filter(|(key, _)| !key.is_empty())).collect();
            let configuration = Configuration::parse(&pairs);
            assert_eq!(configuration.is_ok(), split.is_some());
            let (Ok(configuration), Some(split)) = (configuration, split) else { return };
            assert!(configuration.pairs().is_sorted_by(|(one, _), (other, _)| one < other));
            for (key, value) in configuration.pairs() {
                let last = split.iter().rev().find(|(other, _)| other == key).expect("the key");
                assert_eq!(value, last.1);
            }
            assert!(split.iter().all(|(key, _)| configuration.pairs().iter().any(|(other, _)| other == key)));
        });
    }
}
