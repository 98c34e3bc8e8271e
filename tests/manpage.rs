//! Tests that the manual pages are made from the sources of the headers, their `# Notes` included: `kuf(7)` for concepts,
//! `kuf(3)` for types and constants, and a page for each call. `KUF_BLESS=1` writes them.

mod generate;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use generate::{at, comment_at, compare, HEADERS};

#[test]
fn committed_pages_are_the_generated_ones() {
    let made = pages();
    for (name, text) in &made {
        compare(&format!("man/{name}"), text);
        renders_without_a_warning(&at(&format!("man/{name}")));
    }
    let names: BTreeSet<_> = made.into_iter().map(|(name, _)| name).collect();
    let there = std::fs::read_dir(at("man")).expect("man").map(|entry| entry.expect("man").file_name());
    let there: BTreeSet<_> = there.map(|name| name.into_string().expect("UTF-8")).collect();
    assert_eq!(there, names, "man/ has a page for each call, and no other");
}

#[test]
fn readme_shows_the_example_as_it_is() {
    let example = read("examples/c/minimal.c");
    let program = &example[example.find("#define").expect("code")..];
    assert!(read("README.md").contains(program), "README.md does not show examples/c/minimal.c");
}

fn read(path: &str) -> String {
    std::fs::read_to_string(at(path)).unwrap_or_else(|e| panic!("read {path}: {e}"))
}

fn renders_without_a_warning(page: &Path) {
    match Command::new("groff").args(["-man", "-ww", "-z", "-Tutf8"]).arg(page).output() {
        Ok(run) => assert!(
            run.status.success() && run.stderr.is_empty(),
            "groff says: {}",
            String::from_utf8_lossy(&run.stderr)
        ),
        Err(_) => println!("SKIP rendering {}: groff is not installed", page.display()),
    }
}

// ---- Parsing the header ----

/// A declaration and the comment in front of it, one string for each line, without the comment's delimiters.
struct Item {
    comment: Vec<String>,
    code: Vec<String>,
}

impl Item {
    /// The declared name: `struct kuf_options`, `kuf_fill_fn`, `kuf_open`, `KUF_ALL`.
    fn name(&self) -> &str {
        let first = &self.code[0];
        if let Some(rest) = first.strip_prefix("#define ") {
            return rest.split(' ').next().unwrap_or(rest);
        }
        if let Some(rest) = first.strip_prefix("struct ") {
            return rest.trim_end_matches([' ', '{', ';']);
        }
        let before = match first.strip_prefix("typedef ") {
            Some(rest) => rest.split(")(").next().unwrap_or(rest),
            None => first.split('(').next().unwrap_or(first),
        };
        before.rsplit([' ', '*', '(']).next().unwrap_or(before)
    }

    fn is_structure(&self) -> bool {
        self.code[0].starts_with("struct") && self.code[0].ends_with('{')
    }

    /// The comment without its notes, and the notes.
    fn parts(&self) -> (&[String], &[String]) {
        match self.comment.iter().position(|line| line == "# Notes") {
            Some(notes) => (&self.comment[..notes], &self.comment[notes + 1..]),
            None => (&self.comment, &[]),
        }
    }

    fn is_function(&self) -> bool {
        !["#define", "struct", "typedef"].iter().any(|word| self.code[0].starts_with(word))
    }
}

/// Returns the comment at the top, and all declarations in order.
fn take_apart(header: &str) -> (Vec<String>, Vec<Item>) {
    let (mut preamble, mut items) = (Vec::new(), Vec::new());
    let mut comment = Vec::new();
    let mut lines = header.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = comment_at(line, &mut lines) {
            comment = text;
            continue;
        }
        if line.is_empty() {
            if preamble.is_empty() && comment.len() > 1 {
                preamble = std::mem::take(&mut comment);
            }
            continue;
        }
        if comment.is_empty() {
            continue;
        }
        let mut code = vec![line.to_owned()];
        let ends = |code: &str| match code {
            define if define.starts_with("#define") => true,
            body if body.starts_with("struct") && body.contains('{') => body.ends_with("\n};"),
            other => other.ends_with(';'),
        };
        while !ends(&code.join("\n")) {
            code.push(lines.next().expect("a declaration that ends").to_owned());
        }
        items.push(Item { comment: std::mem::take(&mut comment), code });
    }
    (preamble, items)
}

// ---- The pages ----

const SEE_ALSO: &str =
    "userfaultfd(2), ioctl_userfaultfd(2), madvise(2), memfd_create(2), fallocate(2), sigaction(2), pkg-config(1)";

/// A header taken apart.
struct Source {
    name: &'static str,
    preamble: Vec<String>,
    items: Vec<Item>,
}

impl Source {
    fn starting(&self, word: &str) -> Vec<&Item> {
        self.items.iter().filter(|item| item.code[0].starts_with(word)).collect()
    }

    fn functions(&self) -> Vec<&Item> {
        self.items.iter().filter(|item| item.is_function()).collect()
    }
}

/// All pages, with the names of their files.
fn pages() -> Vec<(String, String)> {
    let sources = HEADERS.map(|header| {
        let (preamble, items) = take_apart(&header.whole());
        Source { name: header.name, preamble, items }
    });
    let mut out = vec![
        ("kuf.7".to_owned(), concepts(&sources)),
        ("kuf.3".to_owned(), types(&sources, &read("examples/c/minimal.c"))),
    ];
    for source in &sources {
        for function in source.functions() {
            out.push((format!("{}.3", function.name()), call_page(&sources, source, function)));
        }
    }
    out
}

fn begin(title: &str, section: u32, name: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = String::from(".\\\" SPDX-License-Identifier: MIT OR Apache-2.0\n");
    out.push_str(".\\\" Made from the sources of include/*.h by tests/manpage.rs: change those.\n");
    // One space between sentences, no hyphenation, ragged right margin.
    let _ = writeln!(
        out,
        ".TH {} {section} \"\" \"libkuf {version}\" \"libkuf\"\n.ss 12 0\n.nr HY 0\n.nh\n.ad l\n.SH NAME\n.nh\n{}",
        title.to_uppercase(),
        name
    );
    out
}

fn see_also(out: &mut String, pages: &[String]) {
    let bold = |page: &String| page.split_once('(').map(|(name, rest)| format!("\\fB{name}\\fR({rest}"));
    let pages: Vec<String> = pages.iter().filter_map(bold).collect();
    let _ = writeln!(out, ".SH SEE ALSO\n{}", pages.join(",\n"));
}

/// `kuf(7)`: the preamble, and the errors of every call.
fn concepts(sources: &[Source; 2]) -> String {
    let name = format!("kuf \\- {}", escaped(title(&sources[0].preamble)));
    let mut out = begin("kuf", 7, &name);
    out.push_str(".SH DESCRIPTION\n.nh\n");
    // Skip the title line, which is in NAME.
    prose(&mut out, &sources[0].preamble[2..]);
    out.push_str(".SH HANDLES AND ERRORS\n");
    let handle = sources[0].items.iter().find(|item| item.name() == "kuf").expect("struct kuf");
    for paragraph in handle.parts().0.split(|line| line.is_empty()) {
        let listed = paragraph.iter().position(|line| line.starts_with("-E")).unwrap_or(paragraph.len());
        prose(&mut out, &paragraph[..listed]);
        errors(&mut out, &joined(&paragraph[listed..]));
    }
    prose(&mut out, handle.parts().1);
    out.push_str(".SH THE MECHANISMS OF KVM\n");
    prose(&mut out, &sources[1].preamble[2..]);
    // This is about the headers.
    let mut out = out.replace("This file is generated from the library\\(aqs source.\n", "");
    let calls = sources.iter().flat_map(|source| source.functions()).map(|f| format!("{}(3)", f.name()));
    let mut also: Vec<String> = std::iter::once("kuf(3)".to_owned()).chain(calls).collect();
    also.extend(SEE_ALSO.split(", ").map(str::to_owned));
    see_also(&mut out, &also);
    out
}

/// `kuf(3)`: callbacks, structures and constants, which the calls share.
fn types(sources: &[Source; 2], example: &str) -> String {
    let mut out = begin("kuf", 3, "kuf \\- calls, callbacks, structures and constants of libkuf");
    out.push_str(".SH SYNOPSIS\n.nf\n.B #include <kuf.h>\n.PP\n");
    out.push_str("\\fBcc\\fR \\fIprogram.c\\fR \\fB$(pkg\\-config \\-\\-cflags \\-\\-libs kuf)\\fR\n.PP\n");
    for source in sources {
        if source.name != "kuf.h" {
            let _ = writeln!(out, ".PP\n.B #include <{}>\n.PP", escaped(source.name));
        }
        source.functions().into_iter().for_each(|function| prototype(&mut out, function));
    }
    out.push_str(".fi\n.SH DESCRIPTION\n.nh\nEach call has a page of its own; \\fBkuf\\fR(7) explains the concepts.\n");
    out.push_str(".SH CALLBACKS\n");
    for callback in sources.iter().flat_map(|source| source.starting("typedef")) {
        let _ = writeln!(out, ".SS {}\n.nf", callback.name());
        prototype(&mut out, callback);
        out.push_str(".fi\n.PP\n");
        described(&mut out, callback);
    }
    out.push_str(".SH STRUCTURES\n");
    for structure in sources.iter().flat_map(|source| source.starting("struct")).filter(|s| s.name() != "kuf") {
        whole_structure(&mut out, structure);
    }
    out.push_str(".SH CONSTANTS\n");
    let mut group = String::new();
    for define in sources.iter().flat_map(|source| source.starting("#define")) {
        let next = heading(define.name());
        if next != group {
            let _ = writeln!(out, ".SS {}", escaped(&next));
            group = next;
        }
        constant(&mut out, define);
    }
    out.push_str(".SH EXAMPLE\n.EX\n");
    for line in example.lines().filter(|line| !line.contains("SPDX")) {
        code_line(&mut out, line);
    }
    out.push_str(".EE\n");
    see_also(&mut out, &["kuf(7)".to_owned()]);
    out
}

/// The page of a call, with the structures that it takes and the constants that its text and theirs name as a group.
fn call_page(sources: &[Source; 2], source: &Source, function: &Item) -> String {
    let (text, notes) = function.parts();
    let first = joined(text.split(|line| line.is_empty()).next().unwrap_or(&[]));
    let sentence = first.split_once(". ").map_or(first.trim_end_matches('.'), |(sentence, _)| sentence);
    let short = sentence.split_once(": ").map_or(sentence, |(short, _)| short);
    let mut out = begin(function.name(), 3, &format!("{} \\- {}", function.name(), escaped(&lowered(short))));
    let _ = writeln!(out, ".SH SYNOPSIS\n.nf\n.B #include <{}>\n.PP", escaped(source.name));
    prototype(&mut out, function);
    out.push_str(".fi\n.SH DESCRIPTION\n.nh\n");
    call(&mut out, function, text);
    if !notes.is_empty() {
        out.push_str(".SH NOTES\n");
        prose(&mut out, notes);
    }
    let code = function.code.join(" ");
    let all = || sources.iter().flat_map(|source| &source.items);
    let mut taken: Vec<&Item> =
        all().filter(|s| s.is_structure() && code.contains(&format!("struct {} ", s.name()))).collect();
    if function.name() == "kuf_add_memory" {
        taken.extend(all().filter(|item| item.is_structure() && item.name() == "kuf_source"));
    }
    if function.name() == "kuf_open" {
        taken.extend(all().filter(|item| item.is_structure() && ["kuf_fill", "kuf_event"].contains(&item.name())));
    }
    if !taken.is_empty() {
        out.push_str(".SH STRUCTURES\n");
        taken.iter().for_each(|structure| whole_structure(&mut out, structure));
    }
    let named =
        taken.iter().fold(function.comment.join("\n"), |text, s| text + &s.comment.join("\n") + &s.code.join("\n"));
    let mut constants = String::new();
    for define in all().filter(|item| item.code[0].starts_with("#define")) {
        let name = define.name();
        let in_group = name.match_indices('_').any(|(end, _)| named.contains(&format!("{}_*", &name[..end])));
        if in_group || has_word(&named, name) {
            constant(&mut constants, define);
        }
    }
    if !constants.is_empty() {
        let _ = write!(out, ".SH CONSTANTS\n{constants}");
    }
    out.push_str(".SH VERSION\nSince 0.1.\n");
    let text = function.comment.join(" ");
    let others = all().filter(|item| item.is_function() && item.name() != function.name());
    let also = others.filter(|item| has_word(&text, item.name())).map(|item| format!("{}(3)", item.name()));
    see_also(&mut out, &["kuf(3)".to_owned(), "kuf(7)".to_owned()].into_iter().chain(also).collect::<Vec<_>>());
    out
}

fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

fn lowered(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_lowercase().chain(letters).collect())
}

fn whole_structure(out: &mut String, structure: &Item) {
    let _ = writeln!(out, ".SS struct {}", structure.name());
    described(out, structure);
    fields(out, structure);
}

fn constant(out: &mut String, define: &Item) {
    let name = define.name();
    let value = define.code[0].rsplit_once(name).map_or("", |(_, value)| value.trim());
    let _ = writeln!(out, ".TP\n\\fB{name}\\fR = {}", escaped(value.trim_matches(['(', ')'])));
    in_item(out, &define.comment);
}

/// The comment and, after it, its notes.
fn described(out: &mut String, item: &Item) {
    let (text, notes) = item.parts();
    prose(out, text);
    prose(out, notes);
}

/// Returns the title line without the file's name.
fn title(preamble: &[String]) -> &str {
    preamble[0].split_once(" - ").expect("a title").1
}

fn heading(constant: &str) -> String {
    let known = [
        ("KUF_VERSION_", "Version of the header"),
        ("KUF_MECHANISM_", "Mechanisms"),
        ("KUF_OPEN_", "kuf_options.flags"),
        ("KUF_RUN_", "kuf_fill.flags"),
        ("KUF_FILL_", "What a fill callback returns"),
        ("KUF_MEMORY_", "kuf_memory.flags"),
        ("KUF_FAULT_", "kuf_fault.flags"),
        ("KUF_RESOLVE_", "Flags of kuf_resolve"),
        ("KUF_DISCARD_", "Flags of kuf_discard"),
        ("KUF_SETTING_", "kuf_settings_info.flags"),
        ("KUF_KVM_MEMORY_", "kuf_kvm_memory.flags"),
        ("KUF_KVM_OPEN_", "kuf_options.flags of kuf-kvm.h"),
        ("KUF_KVM_EVENT_", "kuf_event.kind of kuf-kvm.h"),
        ("KUF_KVM_FAULT", "kuf_fault.flags of kuf-kvm.h"),
        ("KUF_SOURCE_", "kuf_source.kind and kuf_source.flags"),
        ("KUF_SPIN_", "Limits"),
        ("KUF_USERFAULTFDS_", "Limits"),
        ("KUF_RECORD_", "Limits"),
        ("KUF_POPULATE_", "kuf_populate_request.flags"),
        ("KUF_END_", "Flags of kuf_close and kuf_remove_memory"),
        ("KUF_PROGRESS_", "kuf_progress_info.flags"),
        ("KUF_EVENT_", "kuf_event.kind"),
        ("KUF_LOG_", "Log levels"),
        ("KUF_FEATURE_", "Features"),
        ("KUF_HISTOGRAM_", "Histograms"),
    ];
    match known.iter().find(|(prefix, _)| constant.starts_with(prefix)) {
        Some((_, heading)) => (*heading).to_owned(),
        None => "Addresses".to_owned(),
    }
}

fn prototype(out: &mut String, item: &Item) {
    let mut line = String::new();
    for argument in joined(&item.code).split_inclusive(", ") {
        if line.len() + argument.trim_end().len() > 80 {
            let _ = writeln!(out, "\\fB{}\\fR", escaped(line.trim_end()));
            line = "        ".to_owned();
        }
        line.push_str(argument);
    }
    let _ = writeln!(out, "\\fB{}\\fR", escaped(&line));
}

/// Formats paragraphs, lists ("  - ") and code (five blanks) of the header's comments.
fn prose(out: &mut String, lines: &[String]) {
    for paragraph in lines.split(|line| line.is_empty()) {
        if paragraph.is_empty() {
            continue;
        }
        if paragraph.iter().all(|line| line.starts_with("    ")) {
            out.push_str(".PP\n.in +4n\n.EX\n");
            paragraph.iter().for_each(|line| code_line(out, &line[4..]));
            out.push_str(".EE\n.in\n");
            continue;
        }
        let first_item = paragraph.iter().position(|line| line.starts_with("  - ")).unwrap_or(paragraph.len());
        if first_item > 0 {
            let _ = writeln!(out, ".PP\n{}", wrapped(&joined(&paragraph[..first_item])));
        }
        let mut item = Vec::new();
        for line in &paragraph[first_item..] {
            if let Some(first) = line.strip_prefix("  - ") {
                bullet(out, &mut item);
                item.push(first.to_owned());
            } else {
                item.push(line.clone());
            }
        }
        bullet(out, &mut item);
    }
}

fn bullet(out: &mut String, item: &mut Vec<String>) {
    if !item.is_empty() {
        let _ = writeln!(out, ".IP \\(bu 2\n{}", wrapped(&joined(item)));
        item.clear();
    }
}

/// Formats a call's text: prose, arguments, results, errors.
fn call(out: &mut String, function: &Item, text: &[String]) {
    let code = function.code.join(" ");
    let inside = code.split_once('(').map_or("", |(_, rest)| rest.trim_end_matches(");"));
    let arguments: Vec<&str> = inside.split(',').filter_map(|argument| argument.rsplit([' ', '*']).next()).collect();
    for paragraph in text.split(|line| line.is_empty()) {
        let text = joined(paragraph);
        let labelled = labels(&text, |label| label.split(", ").all(|name| arguments.contains(&name)));
        if labelled.first().is_some_and(|(before, _)| *before == 0) {
            for (n, (start, label)) in labelled.iter().enumerate() {
                let end = labelled.get(n + 1).map_or(text.len(), |(next, _)| *next);
                let _ = writeln!(out, ".TP\n.I {label}\n{}", wrapped(text[start + label.len() + 1..end].trim()));
            }
        } else if text.starts_with("Returns ") || text.starts_with("-E") {
            out.push_str(".SH RETURN VALUE\n.nh\n");
            returns(out, paragraph, ["int ", "ssize_t "].iter().any(|kind| code.starts_with(kind)));
        } else {
            prose(out, paragraph);
        }
    }
}

/// Formats the paragraph that begins with "Returns". `fails`: the call may fail. Each -errno becomes an entry of a list. A line
/// that is not indented and does not begin with -errno is prose again.
fn returns(out: &mut String, paragraph: &[String], fails: bool) {
    let mut parts: Vec<(bool, String)> = Vec::new();
    for line in paragraph {
        let error = line.starts_with("-E");
        let goes_on = if error { false } else { parts.last().is_some_and(|(e, _)| !*e || line.starts_with(' ')) };
        let kernel = line.starts_with("Kernel: ");
        match parts.last_mut() {
            Some((_, text)) if goes_on && !kernel => {
                text.push(' ');
                text.push_str(line.trim());
            }
            Some((true, text)) if error => {
                text.push(' ');
                text.push_str(line);
            }
            _ => parts.push((error, line.clone())),
        }
    }
    let is_kernel = |part: &(bool, String)| part.1.starts_with("Kernel: ");
    for (_, text) in parts.iter().filter(|part| !part.0 && !is_kernel(part)) {
        let _ = writeln!(out, ".PP\n{}", wrapped(text));
    }
    if !fails {
        return;
    }
    out.push_str(".SH ERRORS\n");
    parts.iter().filter(|part| part.0).for_each(|(_, text)| errors(out, text));
    out.push_str(".PP\nThe errors of every call are in \\fBkuf\\fR(7).\n");
    for (_, text) in parts.iter().filter(|part| is_kernel(part)) {
        let _ = writeln!(out, ".SH KERNEL INTERFACES\n{}", wrapped(text.trim_start_matches("Kernel: ")));
    }
}

/// Formats a list of -errno.
fn errors(out: &mut String, text: &str) {
    let errors = labels(text, |label| label.split(", ").all(|name| name.starts_with("-E")));
    for (n, (start, label)) in errors.iter().enumerate() {
        let end = errors.get(n + 1).map_or(text.len(), |(next, _)| *next);
        let _ = writeln!(out, ".TP\n.B {}\n{}", escaped(label), wrapped(text[start + label.len() + 1..end].trim()));
    }
}

/// Finds the sentences in `text` that begin with a label ("gpa, len: ...") that `is_label` accepts, and the labels.
fn labels(text: &str, is_label: impl Fn(&str) -> bool) -> Vec<(usize, &str)> {
    let starts = std::iter::once(0).chain(text.match_indices(". ").map(|(at, _)| at + 2));
    let label = |start: usize| {
        let end = start + text[start..].find(": ")?;
        is_label(&text[start..end]).then_some((start, &text[start..end]))
    };
    starts.filter_map(label).collect()
}

fn fields(out: &mut String, structure: &Item) {
    let mut lines = structure.code.iter().map(String::as_str).skip(1);
    let mut comment = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(text) = comment_at(line, &mut lines) {
            comment = text;
        } else if line != "};" {
            let _ = writeln!(out, ".TP\n\\fB{}\\fR", escaped(line.trim()));
            in_item(out, &comment);
        }
    }
}

fn in_item(out: &mut String, comment: &[String]) {
    let paragraphs = comment.split(|line| line.is_empty()).filter(|lines| !lines.is_empty() && lines[0] != "# Notes");
    for (n, paragraph) in paragraphs.enumerate() {
        let _ = writeln!(out, "{}{}", if n > 0 { ".IP\n" } else { "" }, wrapped(&joined(paragraph)));
    }
}

// ---- Text for roff ----

fn joined(lines: &[String]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

fn code_line(out: &mut String, line: &str) {
    let line = escaped(line).replace('-', "\\-").replace("\\\\-", "\\-");
    let _ = writeln!(out, "{}{line}", if line.starts_with(['.', '\'']) { "\\&" } else { "" });
}

/// Escapes roff's special characters, and makes minus signs that are not hyphens.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        match c {
            '\\' => out.push_str("\\e"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            '`' => out.push_str("\\(ga"),
            '\'' => out.push_str("\\(aq"),
            '-' => {
                let hyphen = before.is_alphanumeric() && text[at + 1..].starts_with(char::is_alphanumeric);
                out.push_str(if hyphen { "-" } else { "\\-" });
            }
            c => out.push(c),
        }
        before = c;
    }
    out
}

/// Formats a word of prose: names from the header become bold.
fn word(text: &str) -> String {
    let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    // *word* becomes italic. A star elsewhere is C.
    if let Some((inside, after)) = text.strip_prefix('*').and_then(|rest| rest.split_once('*')) {
        if inside.chars().all(|c| c.is_alphabetic() || c == '-') {
            return format!("\\fI{}\\fR{}", escaped(inside), escaped(after));
        }
    }
    let start = text.find("kuf_").into_iter().chain(text.find("KUF_")).min();
    match start {
        Some(start) if start == 0 || !text[..start].ends_with(name) => {
            let end = start + text[start..].find(|c| !name(c)).unwrap_or(text.len() - start);
            format!("{}\\fB{}\\fR{}", escaped(&text[..start]), &text[start..end], word(&text[end..]))
        }
        _ => escaped(text),
    }
}

/// Wraps prose: a new line after each sentence and before column 100.
fn wrapped(text: &str) -> String {
    // Text between backquotes stays as it is.
    let mut marked = String::new();
    for (n, part) in text.split('`').enumerate() {
        let code = n % 2 == 1;
        marked.push_str(&if code { part.replace(' ', "\u{a0}") } else { part.to_owned() });
    }
    let mut lines = vec![String::new()];
    for raw in marked.split(' ').filter(|word| !word.is_empty()) {
        let word = if raw.contains('\u{a0}') {
            // Without the punctuation after it.
            let code = raw.trim_end_matches([',', '.', ':', ';']);
            format!("\\fB{}\\fR{}", escaped(&code.replace('\u{a0}', " ")), &raw[code.len()..])
        } else {
            word(raw)
        };
        let line = lines.last_mut().expect("never empty");
        let sentence_ended = line.ends_with('.') && raw.starts_with(char::is_uppercase);
        if line.is_empty() {
            line.push_str(&word);
        } else if sentence_ended || line.len() + word.len() > 98 {
            lines.push(word);
        } else {
            line.push(' ');
            line.push_str(&word);
        }
    }
    for line in &mut lines {
        if line.starts_with(['.', '\'']) {
            line.insert_str(0, "\\&");
        }
    }
    lines.join("\n")
}
