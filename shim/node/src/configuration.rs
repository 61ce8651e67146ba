//! containerd's configuration: adds the runtime, takes it out again. All else of the file stays as it is, byte for byte.

use anyhow::{Context as _, Result, bail, ensure};
use toml_edit::{DocumentMut, Item, Table, value};

/// The handler, as the RuntimeClass names it.
const HANDLER: &str = "mailroom";
const RUNTIME: &str = "io.containerd.mailroom.v1";

/// What containerd has by itself, but only where its configuration names no runtime at all: with ours alone it would
/// refuse every other pod.
const DEFAULT: (&str, &str) = ("runc", "io.containerd.runc.v2");

/// Marks what is ours: a handler that somebody else has written is neither changed nor removed.
const MARK: &str = "# Added by mailroom-node, which removes it again.";
const END_MARK: &str = "# End of what mailroom-node added.";

/// What a file begins with that there was none of. containerd 2 takes this version too.
const NEW: &str = "version = 2\n";

/// What a template of k3s begins with that there was none of: all that k3s itself would write.
const NEW_TEMPLATE: &str = "{{ template \"base\" . }}\n";

/// A configuration with the runtime, or with nothing of ours.
#[derive(Debug, PartialEq, Eq)]
pub enum Changed {
    /// It was so already.
    No,
    /// The new text.
    To(String),
    /// Nothing is left that anybody else has written.
    Gone,
}

/// Adds the runtime to `config.toml`, of which there may be none; `options` is a file with options for the shim.
///
/// # Errors
/// When it is no TOML, or of a version that containerd itself has given up, or somebody else has another runtime of that
/// name.
pub fn add(text: Option<&str>, options: Option<&str>) -> Result<Changed> {
    let before = text.unwrap_or_default();
    // What was added with other options, or by an earlier version, is made anew.
    let clean = match text.map(remove).transpose()? {
        None | Some(Changed::Gone) => NEW.to_owned(),
        Some(Changed::No) => before.to_owned(),
        Some(Changed::To(text)) => text,
    };
    let mut document = read(&clean)?;
    let mut runtimes = document.as_table_mut();
    for key in ["plugins", plugin(runtimes)?, "containerd", "runtimes"] {
        let item = runtimes.entry(key).or_insert_with(implicit);
        runtimes = item.as_table_mut().with_context(|| format!("{key} is no table; write it as one"))?;
    }
    if let Some(found) = runtimes.get(HANDLER) {
        let kind = found.get("runtime_type").and_then(Item::as_str).unwrap_or_default();
        ensure!(kind == RUNTIME, "the runtime {HANDLER} is there already, as {kind:?}; remove it first");
        return Ok(Changed::No);
    }
    if runtimes.is_empty() {
        runtimes.insert(DEFAULT.0, Item::Table(marked(DEFAULT.1)));
    }
    let mut table = marked(RUNTIME);
    if let Some(options) = options {
        let mut file = Table::new();
        file.insert("ConfigPath", value(options));
        table.insert("options", Item::Table(file));
    }
    runtimes.insert(HANDLER, Item::Table(table));
    let after = document.to_string();
    Ok(if after == before { Changed::No } else { Changed::To(after) })
}

/// A runtime of ours.
fn marked(kind: &str) -> Table {
    let mut table = Table::new();
    table.insert("runtime_type", value(kind));
    table.decor_mut().set_prefix(format!("\n{MARK}\n"));
    table
}

/// A table that is written only by what is in it.
fn implicit() -> Item {
    let mut table = Table::new();
    table.set_implicit(true);
    Item::Table(table)
}

/// Takes the runtime out of `config.toml`, if [`add`] has added it.
///
/// # Errors
/// When it is no TOML.
pub fn remove(text: &str) -> Result<Changed> {
    let mut document = read(text)?;
    let plugin = plugin(document.as_table())?;
    let mut runtimes = document.as_table_mut();
    for key in ["plugins", plugin, "containerd", "runtimes"] {
        match runtimes.get_mut(key).and_then(Item::as_table_mut) {
            Some(table) => runtimes = table,
            None => return Ok(Changed::No),
        }
    }
    let is_ours = |item: &Item| {
        let prefix = item.as_table().and_then(|table| table.decor().prefix()?.as_str());
        prefix.is_some_and(|prefix| prefix.contains(MARK))
    };
    // Whoever has added a runtime since needs the default to be named.
    let others = runtimes.iter().any(|(_, item)| !is_ours(item));
    let goes = |(name, item): &(&str, &Item)| is_ours(item) && (*name == HANDLER || !others);
    let ours: Vec<_> = runtimes.iter().filter(goes).map(|(name, _)| name.to_owned()).collect();
    if ours.is_empty() {
        return Ok(Changed::No);
    }
    for name in ours {
        runtimes.remove(&name);
    }
    let text = document.to_string();
    Ok(if text == NEW { Changed::Gone } else { Changed::To(text) })
}

/// As [`add`] to a template that k3s makes its configuration of, which is no TOML; `version` is that of the result.
///
/// # Errors
/// For a version that there is not.
pub fn add_to_template(text: Option<&str>, version: i64, options: Option<&str>) -> Result<Changed> {
    let before = text.unwrap_or_default();
    let mut after = match text.map(remove_from_template) {
        None | Some(Changed::Gone) => NEW_TEMPLATE.to_owned(),
        Some(Changed::No) => before.to_owned(),
        Some(Changed::To(text)) => text,
    };
    let is_ours = |line: &str| line.trim_start().starts_with('[') && line.contains(&format!(".runtimes.{HANDLER}]"));
    if after.lines().any(is_ours) {
        return Ok(Changed::No);
    }
    if !after.ends_with('\n') {
        after.push('\n');
    }
    let table = format!("plugins.'{}'.containerd.runtimes.{HANDLER}", plugin_of(version)?);
    after += &format!("\n{MARK}\n[{table}]\nruntime_type = {RUNTIME:?}\n");
    if let Some(options) = options {
        after += &format!("[{table}.options]\nConfigPath = {options:?}\n");
    }
    after += &format!("{END_MARK}\n");
    Ok(if after == before { Changed::No } else { Changed::To(after) })
}

/// As [`remove`] from such a template.
pub fn remove_from_template(text: &str) -> Changed {
    let parts = text.split_once(&format!("\n{MARK}\n"));
    let Some((before, Some((_, after)))) =
        parts.map(|(before, rest)| (before, rest.split_once(&format!("{END_MARK}\n"))))
    else {
        return Changed::No;
    };
    let text = format!("{before}{after}");
    if text == NEW_TEMPLATE { Changed::Gone } else { Changed::To(text) }
}

/// The version of a configuration; where it says none, it is the first, that of long ago.
///
/// # Errors
/// When it is no TOML.
pub fn version(text: &str) -> Result<i64> {
    Ok(version_of(read(text)?.as_table()))
}

fn version_of(document: &Table) -> i64 {
    document.get("version").and_then(Item::as_integer).unwrap_or(1)
}

fn read(text: &str) -> Result<DocumentMut> {
    text.parse().context("is no TOML")
}

fn plugin(document: &Table) -> Result<&'static str> {
    plugin_of(version_of(document))
}

/// What the part of containerd is called that Kubernetes talks to.
fn plugin_of(version: i64) -> Result<&'static str> {
    match version {
        2 => Ok("io.containerd.grpc.v1.cri"),
        3 => Ok("io.containerd.cri.v1.runtime"),
        other => bail!("is of version {other}; `containerd config migrate` makes one of version 2 or 3 of it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [(&str, &str, &str); 5] = [
        (
            "containerd 1.6, its default",
            include_str!("../golden/1.6-before.toml"),
            include_str!("../golden/1.6-after.toml"),
        ),
        (
            "containerd 1.6, nearly empty",
            include_str!("../golden/1.6-debian-before.toml"),
            include_str!("../golden/1.6-debian-after.toml"),
        ),
        ("containerd 1.7", include_str!("../golden/1.7-before.toml"), include_str!("../golden/1.7-after.toml")),
        ("containerd 2", include_str!("../golden/2.1-before.toml"), include_str!("../golden/2.1-after.toml")),
        (
            "containerd 2, of version 2",
            include_str!("../golden/2.1-version-2-before.toml"),
            include_str!("../golden/2.1-version-2-after.toml"),
        ),
    ];

    const TEMPLATES: [(&str, i64, &str, &str); 2] = [
        (
            "k3s with containerd 1.7",
            2,
            include_str!("../golden/k3s-before.toml.tmpl"),
            include_str!("../golden/k3s-after.toml.tmpl"),
        ),
        (
            "k3s with containerd 2",
            3,
            include_str!("../golden/k3s-v3-before.toml.tmpl"),
            include_str!("../golden/k3s-v3-after.toml.tmpl"),
        ),
    ];

    /// The runtime comes in and goes out; nothing else changes, not even a comment.
    #[test]
    fn configurations_come_out_as_they_were() {
        for (what, before, after) in GOLDEN {
            let Changed::To(added) = add(Some(before), None).expect(what) else { panic!("{what}: unchanged") };
            let missing: Vec<_> = before.lines().filter(|line| !added.contains(line)).collect();
            assert!(missing.is_empty(), "{what}: lost {missing:?}");
            assert_eq!(added, after, "{what}");
            assert_eq!(add(Some(after), None).expect(what), Changed::No, "{what}");
            assert_eq!(remove(after).expect(what), Changed::To(before.to_owned()), "{what}");
            assert_eq!(remove(before).expect(what), Changed::No, "{what}");
        }
    }

    #[test]
    fn templates_come_out_as_they_were() {
        for (what, version, before, after) in TEMPLATES {
            assert_eq!(
                add_to_template(Some(before), version, None).expect(what),
                Changed::To(after.to_owned()),
                "{what}"
            );
            assert_eq!(add_to_template(Some(after), version, None).expect(what), Changed::No, "{what}");
            assert_eq!(remove_from_template(after), Changed::To(before.to_owned()), "{what}");
            assert_eq!(remove_from_template(before), Changed::No, "{what}");
        }
    }

    /// A file that there was not goes again.
    #[test]
    fn new_files_go_again() {
        let Changed::To(new) = add(None, None).expect("a new file") else { panic!("no file") };
        assert_eq!(version(&new).expect("TOML"), 2);
        assert_eq!(remove(&new).expect("TOML"), Changed::Gone);
        let Changed::To(new) = add_to_template(None, 3, None).expect("a new template") else { panic!("no template") };
        assert_eq!(remove_from_template(&new), Changed::Gone);
    }

    /// Options that change are changed, and go with the rest.
    #[test]
    fn options_are_a_file() {
        for (what, before, after) in GOLDEN {
            let text = |changed: Changed| match changed {
                Changed::To(text) => text,
                other => panic!("{what}: {other:?}"),
            };
            let with = text(add(Some(after), Some("/etc/mailroom.toml")).expect(what));
            assert!(with.contains("ConfigPath = \"/etc/mailroom.toml\""), "{what}: {with}");
            assert_eq!(add(Some(&with), Some("/etc/mailroom.toml")).expect(what), Changed::No, "{what}");
            assert_eq!(text(remove(&with).expect(what)), before, "{what}");
        }
        for (what, version, before, after) in TEMPLATES {
            let Changed::To(with) = add_to_template(Some(after), version, Some("/o")).expect(what) else {
                panic!("{what}")
            };
            assert!(with.contains("ConfigPath = \"/o\""), "{what}: {with}");
            assert_eq!(remove_from_template(&with), Changed::To(before.to_owned()), "{what}");
        }
    }

    /// containerd takes ours for all that there are when there are no others, and runc's pods have to run on; also those
    /// of whoever adds a runtime afterwards.
    #[test]
    fn the_default_runtime_stays() {
        for (version, plugin) in [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")] {
            let before = format!("version = {version}\n# mine\n");
            let Changed::To(added) = add(Some(&before), None).expect("TOML") else { panic!("unchanged") };
            assert!(added.contains(".runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n"), "{added}");
            assert_eq!(remove(&added).expect("TOML"), Changed::To(before));
            let crun = format!("{added}[plugins.'{plugin}'.containerd.runtimes.crun]\n");
            let Changed::To(removed) = remove(&crun).expect("TOML") else { panic!("unchanged") };
            let left = ["runc", "crun", HANDLER].map(|name| removed.contains(&format!(".runtimes.{name}]")));
            assert_eq!(left, [true, true, false], "{removed}");
        }
    }

    #[test]
    fn what_others_wrote_stays() {
        let own = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mailroom]\n";
        let ours = format!("{own}runtime_type = \"io.containerd.mailroom.v1\"\n");
        assert_eq!(add(Some(&ours), None).expect("the runtime is there"), Changed::No);
        assert_eq!(remove(&ours).expect("the runtime is somebody else's"), Changed::No);
        let other = format!("{own}runtime_type = \"io.containerd.runc.v2\"\n");
        assert!(add(Some(&other), None).expect_err("another runtime").to_string().contains("io.containerd.runc.v2"));
        for wrong in ["", "disabled_plugins = [\"cri\"]\n", "version = 4\n", "version = 2\nplugins = 1\n", "version"] {
            assert!(add(Some(wrong), None).is_err(), "{wrong:?}");
        }
    }
}
