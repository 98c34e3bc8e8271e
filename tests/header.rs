//! Tests that the headers are what `src/abi.rs`, `src/abi_kvm.rs` and `src/capi` make. `KUF_BLESS=1` writes them.

mod generate;

use generate::{comment_at, compare, Header, HEADERS};

/// The longest line of a header.
const WIDTH: usize = 120;

#[test]
fn committed_headers_are_the_generated_ones() {
    for header in &HEADERS {
        compare(&format!("include/{}", header.name), &short(header));
    }
}

#[test]
fn the_header_can_be_read_in_one_go() {
    let text = short(&HEADERS[0]);
    let lines = text.lines().count();
    assert!(lines <= 900, "include/kuf.h has {lines} lines: move details to `# Notes`, which the manual pages have");
    for line in text.lines() {
        assert!(line.chars().count() <= WIDTH, "a line of kuf.h is too long: {line}");
    }
}

/// The header itself: without notes, and in few lines.
fn short(header: &Header) -> String {
    let whole = header.whole();
    let mut out: Vec<String> = Vec::new();
    let mut lines = whole.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(mut body) = comment_at(line, &mut lines) else {
            let goes_on = group(out.last().map_or("", |last| last));
            // A group of constants is one paragraph.
            if line.is_empty() && goes_on.is_some() {
                let mut ahead = lines.clone();
                while ahead.next_if(|l| !l.starts_with("#define")).is_some() && ahead.peek().is_some() {
                    if ahead.peek().is_some_and(|l| ["struct", "typedef", "#if"].iter().any(|w| l.starts_with(w))) {
                        break;
                    }
                }
                if group(ahead.peek().unwrap_or(&"")) == goes_on {
                    continue;
                }
            }
            if !line.is_empty() || out.last().is_some_and(|last| !last.is_empty()) {
                out.push(line.to_owned());
            }
            continue;
        };
        if let Some(notes) = body.iter().position(|l| l == "# Notes") {
            body.truncate(notes.saturating_sub(1));
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let item = *lines.peek().unwrap_or(&"");
        let is_small = ["#define", "typedef"].iter().any(|word| item.starts_with(word))
            || item.starts_with("    ") && item.ends_with(';');
        match body.as_slice() {
            // Scripts read the version.
            [only] if is_small && item.len() + only.len() + 7 <= WIDTH && !item.contains("_VERSION_") => {
                out.push(format!("{item} /* {only} */"));
                lines.next();
            }
            [only] if indent.len() + only.len() + 6 <= WIDTH => out.push(format!("{indent}/* {only} */")),
            [first, middle @ .., last] if is_small => {
                out.push(format!("{indent}/* {first}"));
                out.extend(middle.iter().map(|l| format!("{indent} * {l}").trim_end().to_owned()));
                out.push(format!("{indent} * {last} */"));
            }
            body => {
                out.push(format!("{indent}/*"));
                out.extend(body.iter().map(|l| format!("{indent} * {l}").trim_end().to_owned()));
                out.push(format!("{indent} */"));
            }
        }
    }
    let mut have = vec!["/* For #ifdef: this header has the call. */".to_owned()];
    have.extend(calls(&whole).iter().map(|call| format!("#define KUF_HAVE_{} 1", call.to_uppercase())));
    have.push(String::new());
    let end = out.iter().rposition(|line| line.starts_with("#ifdef __cplusplus")).expect("the end of the calls");
    out.splice(end..end, have);
    out.join("\n") + "\n"
}

/// The names of the calls that a header declares.
fn calls(header: &str) -> Vec<&str> {
    let declared = header.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    let declared = declared.filter(|line| !line.starts_with("typedef")).filter_map(|line| line.split_once('('));
    declared.filter_map(|(before, _)| before.rsplit([' ', '*']).next()).collect()
}

/// The group of a constant: KUF_OPEN_ of KUF_OPEN_DIRECT.
fn group(line: &str) -> Option<&str> {
    let name = line.strip_prefix("#define ")?.split(' ').next()?;
    let kind = name.strip_prefix("KUF_KVM_").or(name.strip_prefix("KUF_"))?;
    let end = kind.find('_')?;
    Some(&kind[..end])
}
