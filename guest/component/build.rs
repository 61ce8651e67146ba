//! Puts models that were learned into the component: `MAILROOM_TEAM_MODEL` and `MAILROOM_PRIORITY_MODEL` name their
//! files. Without them words decide.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let mut source = String::new();
    for (variable, name) in [("MAILROOM_TEAM_MODEL", "TEAM"), ("MAILROOM_PRIORITY_MODEL", "PRIORITY")] {
        println!("cargo::rerun-if-env-changed={variable}");
        let value = match env::var(variable).ok().filter(|file| !file.is_empty()) {
            Some(file) => {
                let file = fs::canonicalize(&file)
                    .map_err(|error| io::Error::new(error.kind(), format!("{variable}={file}: {error}")))?;
                println!("cargo::rerun-if-changed={}", file.display());
                format!("Some(include_bytes!({:?}))", file.display().to_string())
            }
            None => "None".to_owned(),
        };
        source += &format!("pub static {name}: Option<&[u8]> = {value};\n");
    }
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    fs::write(Path::new(&out).join("models.rs"), source)
}
