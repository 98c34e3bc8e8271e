//! `include/kuf.h` is what cbindgen makes of `src/capi` today. `KUF_BLESS=1` writes it.

use std::path::Path;

#[test]
fn committed_header_is_the_generated_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut made = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/capi/types.rs"))
        .with_src(root.join("src/capi/mod.rs"))
        .generate()
        .expect("cbindgen reads src/capi")
        .write(&mut made);
    let made = in_c_manners(&String::from_utf8(made).expect("UTF-8"));
    let path = root.join("include/kuf.h");
    if std::env::var_os("KUF_BLESS").is_some() {
        std::fs::write(&path, &made).expect("write include/kuf.h");
        return;
    }
    let committed = std::fs::read_to_string(&path).expect("read include/kuf.h");
    assert!(committed == made, "include/kuf.h has drifted from src/capi: run `make header` and commit the result");
}

/// Lays comments out as C programmers write them, and drops what speaks to Rust callers only (`# Safety`: the header
/// says the same of each argument).
fn in_c_manners(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "/*" {
            out.push_str(line.trim_end());
            out.push('\n');
            continue;
        }
        let indent = &line[..line.len() - "/*".len()];
        let mut body: Vec<&str> =
            lines.by_ref().take_while(|l| l.trim() != "*/").map(|l| l.trim_start_matches(indent).trim_end()).collect();
        // The preamble of cbindgen.toml is laid out by hand.
        let by_hand = body.iter().all(|l| l.trim_start().starts_with('*'));
        if let Some(safety) = body.iter().position(|l| l.trim() == "# Safety") {
            body.truncate(safety.saturating_sub(1));
        }
        match body.as_slice() {
            [only] if !by_hand => out.push_str(&format!("{indent}/* {} */\n", only.trim())),
            _ => {
                out.push_str(&format!("{indent}/*\n"));
                for l in body {
                    let l = if by_hand { l.trim_start().trim_start_matches('*') } else { l };
                    out.push_str(format!("{indent} *{l}").trim_end());
                    out.push('\n');
                }
                out.push_str(&format!("{indent} */\n"));
            }
        }
    }
    out
}
