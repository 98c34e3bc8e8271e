//! The texts of the headers and manual pages, as cbindgen makes them from the source.

use std::path::{Path, PathBuf};

pub struct Header {
    pub name: &'static str,
    config: &'static str,
    sources: [&'static str; 2],
}

pub const HEADERS: [Header; 2] = [
    Header { name: "kuf.h", config: "cbindgen.toml", sources: ["src/abi.rs", "src/capi/mod.rs"] },
    Header { name: "kuf-kvm.h", config: "cbindgen-kvm.toml", sources: ["src/abi_kvm.rs", "src/capi/kvm.rs"] },
];

pub fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Checks that the file at `path` is `made`, or writes it with `KUF_BLESS=1`.
pub fn compare(path: &str, made: &str) {
    if std::env::var_os("KUF_BLESS").is_some() {
        std::fs::write(at(path), made).unwrap_or_else(|e| panic!("write {path}: {e}"));
        return;
    }
    let committed = std::fs::read_to_string(at(path)).unwrap_or_default();
    assert!(committed == made, "{path} is not what the source makes: run `make header` and commit the result");
}

impl Header {
    /// All of the text, with the `# Notes` that only the manual pages have. Each comment is a block in C style.
    pub fn whole(&self) -> String {
        let config = cbindgen::Config::from_file(at(self.config)).expect("the configuration of cbindgen");
        let builder = cbindgen::Builder::new().with_config(config);
        let builder = self.sources.iter().fold(builder, |builder, source| builder.with_src(at(source)));
        let mut made = Vec::new();
        builder.generate().expect("cbindgen reads the sources").write(&mut made);
        in_c_manners(&String::from_utf8(made).expect("UTF-8"))
    }
}

/// Returns the comment that starts at `line`, if any, without its delimiters; takes the rest of it from `lines`.
pub fn comment_at<'a>(line: &str, lines: &mut impl Iterator<Item = &'a str>) -> Option<Vec<String>> {
    let start = line.trim_start().strip_prefix("/*")?;
    if let Some(only) = start.strip_suffix("*/") {
        return Some(vec![only.trim().to_owned()]);
    }
    let body = lines.take_while(|l| l.trim() != "*/");
    Some(
        body.map(|l| l.trim_start().strip_prefix('*').map_or("", |l| l.strip_prefix(' ').unwrap_or(l)).to_owned())
            .collect(),
    )
}

/// Lays comments out in C style, indents the tables that are fenced for rustdoc, and drops the `# Safety` sections for Rust callers, whose content the header gives for
/// each argument.
fn in_c_manners(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "/*" {
            // Flags are unsigned, so that `~FLAG` can be used with any unsigned type.
            let line = if line.starts_with("#define") { line.replace("(1 << ", "(1u << ") } else { line.into() };
            // C89 has no other comments.
            let line = line.split_once("// ").map_or(line.clone(), |(code, text)| format!("{code}/* {text} */"));
            out.push_str(line.trim_end());
            out.push('\n');
            continue;
        }
        let indent = &line[..line.len() - "/*".len()];
        let mut body: Vec<&str> =
            lines.by_ref().take_while(|l| l.trim() != "*/").map(|l| l.trim_start_matches(indent).trim_end()).collect();
        // The preamble of cbindgen.toml is already in C style.
        let by_hand = body.iter().all(|l| l.trim_start().starts_with('*'));
        if let Some(safety) = body.iter().position(|l| l.trim() == "# Safety") {
            body.truncate(safety.saturating_sub(1));
        }
        match body.as_slice() {
            [only] if !by_hand => out.push_str(&format!("{indent}/* {} */\n", only.trim())),
            _ => {
                out.push_str(&format!("{indent}/*\n"));
                let mut is_table = false;
                for l in body {
                    if l.trim_start().starts_with("```") {
                        is_table = !is_table;
                        continue;
                    }
                    let l = if by_hand { l.trim_start().trim_start_matches('*') } else { l };
                    let table = if is_table { "    " } else { "" };
                    out.push_str(format!("{indent} *{table}{l}").trim_end());
                    out.push('\n');
                }
                out.push_str(&format!("{indent} */\n"));
            }
        }
    }
    out
}
