#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# install.sh install|uninstall: puts the built files under DESTDIR, or removes them. The Makefile sets the variables; it runs
# this in the folder of the source. One list serves both, so that uninstall removes what install made.
set -eu

action=$1

refuse() {
    echo "$*" >&2
    exit 1
}

# A program looks for the library at run time in a place that does not depend on where make ran. kuf.pc quotes these paths.
for name in PREFIX LIBDIR INCLUDEDIR MANDIR DOCDIR; do
    eval "path=\$$name"
    case $path in
    *[\"\\\$\`\#]* | *"
"*) refuse "$name has a character that kuf.pc cannot hold: '$path'" ;;
    /* | "") path=$(printf %s "$path" | tr -s / | sed 's|/$||') ;;
    *) refuse "$name is a relative path: '$path'; give an absolute one" ;;
    esac
    # PREFIX may be the root.
    [ -n "$path" ] || [ $name = PREFIX ] || refuse "$name is empty"
    eval "$name=\$path"
done
case $DESTDIR in
/* | "") ;;
*) DESTDIR=$PWD/$DESTDIR ;;
esac

# put MODE FILE FOLDER
put() {
    if [ "$action" = uninstall ]; then
        rm -f "$DESTDIR$3/${2##*/}"
    else
        $INSTALL -d "$DESTDIR$3"
        $INSTALL -m "$1" "$2" "$DESTDIR$3/${2##*/}"
    fi
}

# link TARGET FOLDER NAME
link() {
    if [ "$action" = uninstall ]; then rm -f "$DESTDIR$2/$3"; else ln -sf "$1" "$DESTDIR$2/$3"; fi
}

# below_prefix PATH: with the variable of kuf.pc in place of PREFIX, as the replacement of sed's s.
below_prefix() {
    case $1 in
    "$PREFIX"/*) printf %s "\${prefix}${1#"$PREFIX"}" ;;
    *) printf %s "$1" ;;
    esac | sed 's/[&|]/\\&/g'
}

so=libkuf.so.$VERSION
soname=libkuf.so.${VERSION%%.*}
put 755 "$BUILD/$so" "$LIBDIR"
[ "$so" = "$soname" ] || link "$so" "$LIBDIR" "$soname"
link "$soname" "$LIBDIR" libkuf.so
put 644 "$BUILD/libkuf.a" "$LIBDIR"

pc=$(mktemp -d)
trap 'rm -rf "$pc"' EXIT
sed -e "s|@PREFIX@|$(printf %s "$PREFIX" | sed 's/[&|]/\\&/g')|" -e "s|@VERSION@|$VERSION|" \
    -e "s|@LIBDIR@|$(below_prefix "$LIBDIR")|" -e "s|@INCLUDEDIR@|$(below_prefix "$INCLUDEDIR")|" \
    pkgconfig/kuf.pc.in >"$pc/kuf.pc"
put 644 "$pc/kuf.pc" "$LIBDIR/pkgconfig"

for header in include/*.h; do put 644 "$header" "$INCLUDEDIR"; done
for page in man/*.[137]; do
    [ ! -f "$page" ] || put 644 "$page" "$MANDIR/man${page##*.}"
done
for script in examples/trace/*; do
    [ ! -f "$script" ] || put 644 "$script" "$DOCDIR/examples/trace"
done

if [ "$action" = uninstall ]; then
    # Only the folders that are the library's own.
    for folder in "$DOCDIR/examples/trace" "$DOCDIR/examples" "$DOCDIR"; do
        rmdir "$DESTDIR$folder" 2>/dev/null || true
    done
fi
