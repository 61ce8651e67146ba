//! `wasi:config/store`: what the operator passed, read-only and the same for every message. Guests that export
//! `mailroom:triage/configured` are told the same.

use super::State;
use crate::interface::wasi::config::store::{Error, Host};
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use toml::{Table, Value};

/// Largest configuration in bytes, keys and values together: every message that asks gets a copy.
const MAX_BYTES: usize = 64 << 10;

/// The pairs that a guest reads through `wasi:config/store`, in the order of their keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration(Arc<[(String, String)]>);

impl Configuration {
    /// Takes `KEY=VALUE` pairs; of a repeated key the last one counts.
    ///
    /// # Errors
    /// As [`Configuration::with`].
    pub fn parse<S: AsRef<str>>(pairs: impl IntoIterator<Item = S>) -> Result<Self> {
        Self::default().with(pairs)
    }

    /// Adds `KEY=VALUE` pairs, which replace what is there under their keys.
    ///
    /// # Errors
    /// A pair without a key or without `=`, or more than 64 KiB in all.
    pub fn with<S: AsRef<str>>(self, pairs: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut sorted: BTreeMap<String, String> = self.0.iter().cloned().collect();
        for pair in pairs {
            match pair.as_ref().split_once('=') {
                Some((key, value)) if !key.is_empty() => sorted.insert(key.to_string(), value.to_string()),
                _ => bail!("--config {:?} is not of the form KEY=VALUE", pair.as_ref()),
            };
        }
        Self::of(sorted, "--config")
    }

    /// Reads a TOML file. `[queue]` with `default = "a"` is the key `queue.default`; a list of texts is one text with
    /// commas, a list of tables is numbered from 1; `{ file = "PATH" }` is what stands in that file, without the end of
    /// its last line: a secret, say. A relative path begins at the folder of the TOML file.
    ///
    /// # Errors
    /// A file that cannot be read, no TOML, a value that has no place in a text, or more than 64 KiB in all.
    pub fn read(path: &Path) -> Result<Self> {
        let named = || format!("--config-file {}", path.display());
        let text = std::fs::read_to_string(path).with_context(named)?;
        let table: Table = toml::from_str(&text).with_context(named)?;
        let mut pairs = BTreeMap::new();
        let folder = path.parent().unwrap_or(Path::new(""));
        flatten(&mut pairs, String::new(), Value::Table(table), folder).with_context(named)?;
        Self::of(pairs, &named())
    }

    fn of(pairs: BTreeMap<String, String>, source: &str) -> Result<Self> {
        let bytes: usize = pairs.iter().map(|(key, value)| key.len() + value.len()).sum();
        ensure!(bytes <= MAX_BYTES, "{source}: {bytes} bytes in all; at most {MAX_BYTES}");
        Ok(Self(pairs.into_iter().collect()))
    }

    /// The pairs.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }
}

/// Adds `value` under `key`, or what is in it under longer keys.
fn flatten(pairs: &mut BTreeMap<String, String>, key: String, value: Value, folder: &Path) -> Result<()> {
    let below = |part: &str| if key.is_empty() { part.to_owned() } else { format!("{key}.{part}") };
    match value {
        Value::Table(table) if !key.is_empty() && table.len() == 1 && table.contains_key("file") => {
            let Some(file) = table["file"].as_str() else { bail!("{key}: `file` has to be a path") };
            let path = folder.join(file);
            let text = std::fs::read_to_string(&path).with_context(|| format!("{key}: read {}", path.display()))?;
            let text = text.strip_suffix('\n').map_or(&*text, |text| text.strip_suffix('\r').unwrap_or(text));
            pairs.insert(key, text.to_owned());
        }
        Value::Table(table) => {
            for (part, value) in table {
                ensure!(!part.is_empty(), "{key:?}: an empty key");
                flatten(pairs, below(&part), value, folder)?;
            }
        }
        Value::Array(list) if list.iter().all(Value::is_table) => {
            for (number, value) in (1..).zip(list) {
                flatten(pairs, below(&number.to_string()), value, folder)?;
            }
        }
        Value::Array(list) => {
            let texts: Result<Vec<String>> = list.into_iter().map(|value| text(&key, value)).collect();
            pairs.insert(key, texts?.join(","));
        }
        value => {
            let text = text(&key, value)?;
            pairs.insert(key, text);
        }
    }
    Ok(())
}

fn text(key: &str, value: Value) -> Result<String> {
    Ok(match value {
        Value::String(text) => text,
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(is) => is.to_string(),
        Value::Datetime(time) => time.to_string(),
        Value::Array(_) | Value::Table(_) => bail!("{key}: a list may hold texts or tables, and no lists"),
    })
}

impl Host for State {
    fn get(&mut self, key: String) -> Result<Option<String>, Error> {
        let pairs = &self.grants.configuration.0;
        Ok(pairs.binary_search_by(|(name, _)| name.cmp(&key)).ok().map(|at| pairs[at].1.clone()))
    }

    fn get_all(&mut self) -> Result<Vec<(String, String)>, Error> {
        Ok(self.grants.configuration.0.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities::Grants;

    #[test]
    fn the_last_value_of_a_key_counts() -> Result<()> {
        let configuration = Configuration::parse(["b=1", "a=x=y", "b=2", "c="])?;
        let mut state = State::new(Grants { configuration, ..Grants::default() }.into(), 0);
        assert_eq!(state.get("a".into()).expect("found"), Some("x=y".into()));
        assert_eq!(state.get("b".into()).expect("found"), Some("2".into()));
        assert_eq!(state.get("c".into()).expect("found"), Some(String::new()));
        assert_eq!(state.get("d".into()).expect("looked up"), None);
        assert_eq!(state.get_all().expect("listed").len(), 3);
        Ok(())
    }

    #[test]
    fn a_file_gives_keys_with_dots() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("guest.toml");
        std::fs::write(folder.path().join("secret"), "hunter 2\n")?;
        let text = r#"
            answer = 42
            [queue]
            default = "helpdesk"
            names = ["a", "b", 3]
            [[rule]]
            from = "x"
            [[rule]]
            to = "y"
            [token]
            file = "secret"
        "#;
        std::fs::write(&path, text)?;
        let pairs = |pairs: &[(String, String)]| {
            pairs.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join("\n")
        };
        let read = Configuration::read(&path)?;
        let expected =
            "answer=42\nqueue.default=helpdesk\nqueue.names=a,b,3\nrule.1.from=x\nrule.2.to=y\ntoken=hunter 2";
        assert_eq!(pairs(read.pairs()), expected);
        let changed = read.with(["answer=43"])?;
        assert_eq!(pairs(changed.pairs()), expected.replace("42", "43"));
        for (text, reason) in [
            ("a", "expected"),
            ("a = [[1]]", "no lists"),
            ("a = { file = \"none\" }", "a: read"),
            ("a = { file = 1 }", "has to be a path"),
            (&format!("a = \"{}\"", "x".repeat(MAX_BYTES)), "at most 65536"),
        ] {
            std::fs::write(&path, text)?;
            let error = format!("{:#}", Configuration::read(&path).expect_err(reason));
            assert!(error.contains("guest.toml") && error.contains(reason), "{error}");
        }
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
